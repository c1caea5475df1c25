"""The health of the nodes of a job: real processes on nodes of a network, as torchrun starts them.

A slow end and a slow link are made by the kernel's own limits of rate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.network.elastic_network import Network, network
from support.network.limited_links import limit_link, limit_node
from support.processes.forked_command import ForkedCommand
from support.runs.elastic_runs import Starter, Task

pytestmark = [pytest.mark.mp, pytest.mark.slow]

LONGEST_S = 240.0
NODES = "abcd"
FAST, SLOW = 160, 20
"""Mbit/s: four nodes of a few cores reach the faster one all at once."""
LOOK = ("health", "--pairwise", "--memory-mib", "4", "--disk-mib", "0")


def by_torchrun(net: Network, rank: int) -> dict[str, str]:
    """What torchrun sets for the only process of a node."""
    return {
        **{"RANK": str(rank), "WORLD_SIZE": str(net.size), "GROUP_RANK": str(rank)},
        **{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": net.address(net.node(0)), "MASTER_PORT": "29611"},
    }


def looked_at(
    net: Network,
    folder: Path,
    *arguments: str,
    variables: Mapping[int, Mapping[str, str]] | None = None,
    by_slurm: bool = False,
) -> tuple[list[int], dict[str, Any]]:
    """The exit codes of `holdfast health --pairwise` on all nodes, and what the first one says."""
    processes = []
    for rank in range(net.size):
        job = Task(net, rank).environment if by_slurm else by_torchrun(net, rank)
        own = (variables or {}).get(rank, {})
        environment = {**os.environ, **job, "OMP_NUM_THREADS": "1", **own}
        command = [*LOOK, "--json", *arguments]
        processes.append(
            ForkedCommand(
                command,
                folder / f"{rank}.json",
                environment,
                errors=folder / f"{rank}.txt",
                network=net.name(net.node(rank)),
            )
        )
    codes = [process.wait(LONGEST_S) for process in processes]
    said = (folder / "0.json").read_text()
    assert said, (folder / "0.txt").read_text()
    return codes, json.loads(said)


def sick_checks(report: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The number of the node, and the name, of each check that has not passed."""
    return [
        (number, check["name"])
        for number, node in enumerate(report["nodes"])
        for check in node["checks"]
        if not check["passed"]
    ]


def slow_links(report: Mapping[str, Any]) -> list[list[int]]:
    """The numbers of the nodes of each slow link."""
    names = [node["node"] for node in report["nodes"]]
    return sorted(
        [names.index(end) for end in link["nodes"]]
        for link in report["links"]
        if not link["passed"]
    )


def of_links(found: Sequence[tuple[int, str]]) -> list[int]:
    return [number for number, name in found if name == "links of the node"]


def test_the_slow_end_of_links_is_named(tmp_path: Path) -> None:
    with network(NODES) as net:
        for node in NODES:
            limit_node(net, node, SLOW if node == "b" else FAST)
        codes, report = looked_at(net, tmp_path)
    assert codes == [1] * 4
    assert len(report["links"]) == 4
    assert of_links(sick_checks(report)) == [1], report["links"]
    assert [1 in link for link in slow_links(report)] == [True, True]
    assert not report["passed"]


def test_a_slow_link_is_named_and_its_ends_are_not(tmp_path: Path) -> None:
    with network(NODES) as net:
        for node in NODES:
            limit_node(net, node, FAST)
        limit_link(net, "ac", SLOW, FAST)
        codes, report = looked_at(net, tmp_path, "--rounds", "0")
    assert codes == [1] * 4
    assert len(report["links"]) == 6
    assert of_links(sick_checks(report)) == []
    assert slow_links(report) == [[0, 2]], report["links"]


def test_a_node_with_wrong_bits_is_named_by_the_others(tmp_path: Path) -> None:
    wrong = {1: {"MKL_CBWR": "COMPATIBLE"}}  # other code of the same processor
    path = Starter(tmp_path).write("run", parallel={"data": 3})
    given = (str(path), "--out", str(tmp_path / "run"))
    with network("abc") as net:
        codes, report = looked_at(net, tmp_path, *given, variables=wrong, by_slurm=True)
    assert codes == [1] * 3
    of_bits = {check for check in sick_checks(report) if check[1].startswith("bits of a product")}
    assert of_bits == {(1, "bits of a product, cores")}
    assert {number for number, name in sick_checks(report) if "certificate" in name} == {1}
    clocks = [
        check["value"]
        for node in report["nodes"]
        for check in node["checks"]
        if check["name"] == "clock of the node"
    ]
    assert len(clocks) == 3
    assert max(map(abs, clocks)) < 0.1  # they share one clock


def test_a_node_that_is_well_alone_ends_with_0_and_wrong_arguments_with_2(tmp_path: Path) -> None:
    def told(name: str, *arguments: str) -> tuple[int, str, str]:
        output, errors = tmp_path / f"{name}.out", tmp_path / f"{name}.err"
        done = ForkedCommand(
            ["health", *arguments], output, {**os.environ, "OMP_NUM_THREADS": "1"}, errors=errors
        )
        return done.wait(LONGEST_S), output.read_text(), errors.read_text()

    small = ("--path", str(tmp_path), "--memory-mib", "4", "--disk-mib", "4")
    code, said, _ = told("well", *small, "--json")
    assert code == 0
    report = json.loads(said)
    assert report["passed"]
    names = [check["name"] for check in report["nodes"][0]["checks"]]
    assert "memory of cpu" in names
    assert f"room, {tmp_path}" in names
    code, said, _ = told("table", *small)
    assert code == 0
    assert said.endswith("1 node: nothing is wrong\n")
    for arguments, reason in (
        (("--pairwise",), "start it by torchrun, srun or mpirun"),
        (("--set", "model.layers=2"), "name its CONFIG.toml"),
        ((str(tmp_path / "none.toml"),), "none.toml"),
        (("--rounds", "-1"), "--rounds"),
    ):
        code, _, errors = told("wrong", *arguments)
        assert code == 2
        assert reason in errors
