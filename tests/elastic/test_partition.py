"""A network that really parts: both sides live, and at most one of them goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.network.elastic_network import Network, network
from support.runs.elastic_demo import Run, demonstration, wait_for

pytestmark = [pytest.mark.mp, pytest.mark.chaos, pytest.mark.slow]

NODES = {"a": (0, 1), "b": (2, 3), "c": (4,)}


def _start(run: Run, net: Network) -> None:
    for node, ranks in NODES.items():
        run.start_node(node, ranks, net.name(node), host=net.address(node))


def test_the_minority_stops_and_the_majority_goes_on(tmp_path: Path) -> None:
    with (
        network("abc") as net,
        demonstration(tmp_path, 5, hub=net.hub, agree_s=5.0, store_s=2.0) as run,
    ):
        _start(run, net)
        first = run.reach(0, ["0", "1", "2", "3", "4"])
        run.more_steps(4)  # it has a step of that generation to look at
        net.cut("c")
        for rank in range(4):
            run.reach(rank, ["0", "1", "2", "3"], after=first["number"])
        run.more_steps(0)
        wait_for(lambda: run.records(4, "gave up"), "the minority to give up", run.describe)
        assert {record["generation"] for record in run.records(4, "step")} == {first["number"]}
        net.heal()

        def joined() -> bool:
            members = run.generation(0)["members"]
            return len(members) == 5 and members[4].startswith("4.")

        wait_for(joined, "the lost node's worker to join again", run.describe)
        run.check_history(range(5))


def test_a_minority_that_has_the_lighthouse_does_not_go_on_either(tmp_path: Path) -> None:
    with (
        network("abc") as net,
        demonstration(tmp_path, 5, hub=net.hub, agree_s=60.0, store_s=2.0) as run,
    ):
        _start(run, net)
        first = run.reach(4, ["0", "1", "2", "3", "4"])
        net.cut("ab")
        wait_for(lambda: run.records(4, "disturbed"), "the minority to notice", run.describe)
        wait_for(
            lambda: "no majority" in (tmp_path / "4.log").read_text(), "it to wait", run.describe
        )
        assert run.generation(4) == first
        net.heal()

        def together() -> bool:
            # One whose heartbeats come back late may have been replaced meanwhile.
            newest = [run.generation(rank) for rank in range(5)]
            ranks = {tuple(m.partition(".")[0] for m in found["members"]) for found in newest}
            return ranks == {("0", "1", "2", "3", "4")} and all(
                found["number"] > first["number"] for found in newest
            )

        wait_for(together, "all to go on together", run.describe)
        for rank in range(5):
            steps = [record["step"] for record in run.records(rank, "step")]
            assert steps == sorted(set(steps))
        run.check_history(range(5))
