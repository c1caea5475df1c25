"""A network that really parts: both sides live, and at most one of them goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast.elastic.hang import HangLimits
from holdfast.launch.agent.restarts import RestartPolicy
from support.network.elastic_network import Network, network
from support.runs.elastic_demo import Run, demonstration, wait_for

pytestmark = [pytest.mark.mp, pytest.mark.chaos, pytest.mark.slow]

NODES = {"a": (0, 1), "b": (2, 3), "c": (4,)}
PATIENT: dict[str, Any] = {
    "limits": HangLimits(20.0),
    "restarts": RestartPolicy(limit=1000, first_s=0.01, longest_s=0.01),
}
"""The agents' settings: what waits for busy processors is not hung, and the minority's node is
there when the network is whole again, however long that takes."""


def _start(run: Run, net: Network) -> None:
    for node, ranks in NODES.items():
        run.start_node(node, ranks, net.name(node), host=net.address(node), **PATIENT)


def _ranks(generation: dict[str, Any]) -> list[str]:
    """The members, whichever of their processes: one may have been replaced on a busy machine."""
    return [member.partition(".")[0] for member in generation["members"]]


def _reach(run: Run, rank: int, ranks: list[str], after: int = 0) -> dict[str, Any]:
    """The generation of these ranks, past a number, in which a rank has committed a step."""

    def there() -> dict[str, Any] | None:
        now = run.generation(rank)
        stepped = any(r["generation"] == now["number"] for r in run.records(rank, "step"))
        return now if _ranks(now) == ranks and now["number"] > after and stepped else None

    return wait_for(there, f"rank {rank} to train with ranks {ranks}", run.describe)


def test_the_minority_stops_and_the_majority_goes_on(tmp_path: Path) -> None:
    with (
        network("abc") as net,
        demonstration(tmp_path, 5, hub=net.hub, agree_s=8.0, store_s=2.0) as run,
    ):
        _start(run, net)
        first = _reach(run, 0, ["0", "1", "2", "3", "4"])
        run.more_steps(4)  # it has a step of that generation to look at
        net.cut("c")
        for rank in range(4):
            _reach(run, rank, ["0", "1", "2", "3"], first["number"])
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
        first = _reach(run, 4, ["0", "1", "2", "3", "4"])
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
            return all(
                _ranks(found) == ["0", "1", "2", "3", "4"] and found["number"] > first["number"]
                for found in newest
            )

        wait_for(together, "all to go on together", run.describe)
        for rank in range(5):
            steps = [record["step"] for record in run.records(rank, "step")]
            assert steps == sorted(set(steps))
        run.check_history(range(5))
