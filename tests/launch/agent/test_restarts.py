"""How patient an agent is, and what a change of generation leaves in the record. No processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.elastic.generation import Generation, Identity, Member
from holdfast.elastic.history import RunEvent, change_events
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.elastic.quorum_client import MembershipSettings
from holdfast.launch.agent.restarts import RestartPolicy, Restarts
from holdfast.launch.agent.settings import AgentSettings
from holdfast.launch.launchers.nodes import spread
from holdfast.parallel.errors import MembershipError


def test_the_first_restart_is_at_once_and_each_further_one_later() -> None:
    restarts = Restarts(RestartPolicy(limit=5, first_s=1.0, longest_s=3.0))
    assert [restarts.delay_s(0) for _ in range(6)] == [0.0, 1.0, 2.0, 3.0, 3.0, None]


def test_a_committed_step_makes_patient_again_and_the_same_step_twice_does_not() -> None:
    restarts = Restarts(RestartPolicy(limit=1))
    restarts.committed(7)
    assert restarts.delay_s(0) == 0.0
    restarts.committed(7)
    assert restarts.delay_s(0) is None
    restarts.committed(8)
    assert restarts.delay_s(0) == 0.0


def test_ranks_that_end_together_do_not_use_up_each_others_restarts() -> None:
    restarts = Restarts(RestartPolicy(limit=1))
    assert [restarts.delay_s(rank) for rank in range(8)] == [0.0] * 8


def _generation(number: int, *identities: Identity, leaving: int = -1) -> Generation:
    return Generation(
        number,
        tuple(
            Member(identity, f"node-{identity.rank}", "h:1", 1, 5, "step", identity.rank == leaving)
            for identity in identities
        ),
    )


def test_the_first_generation_is_no_event() -> None:
    assert change_events(None, _generation(1, Identity(0)), []) == []


def test_losses_and_arrivals_are_told_with_their_causes() -> None:
    before = _generation(3, *(Identity(rank) for rank in range(6)), leaving=3)
    after = _generation(4, Identity(0), Identity(1, 1))
    told = [
        MembershipEvent("silent", Identity(1), "no heartbeat for 0.60 s", 0.6),
        MembershipEvent("ended", Identity(1), "stopped by a signal for 0.7 s", 0.7),
        MembershipEvent("silent", Identity(1), "no heartbeat for 0.90 s", 0.9),
        MembershipEvent("silent", Identity(2), "no heartbeat for 0.61 s", 0.61),
        MembershipEvent("ended", Identity(0, 7), "of another time", 9.0),
        MembershipEvent("silent", Identity(4), "cut off"),
        MembershipEvent("ended", Identity(1), "stopped by a signal, as its agent reports it"),
    ]
    assert change_events(before, after, told) == [
        _lost(1, "stopped by a signal for 0.7 s", 0.7),
        RunEvent("rank_joined", {"rank": 1, "incarnation": 1, "node": "node-1", "generation": 4}),
        _lost(2, "no heartbeat for 0.61 s", 0.61),
        RunEvent("rank_left", {"rank": 3, "incarnation": 0, "node": "node-3"}),
        _lost(4, "cut off", None),
        _lost(5, "did not answer", None),
    ]


def _lost(rank: int, cause: str, detected_s: float | None) -> RunEvent:
    fields = {"rank": rank, "incarnation": 0, "node": f"node-{rank}"}
    return RunEvent("rank_lost", {**fields, "cause": cause, "detected_s": detected_s})


def test_a_generation_meets_where_state_is_held_and_stays() -> None:
    members = [
        Member(Identity(0, 1), "a", "a:1", 0, 0, "", False),
        Member(Identity(1), "b", "b:1", 3, 9, "", True),
        Member(Identity(2), "c", "c:1", 3, 9, "", False),
    ]
    assert Generation(4, tuple(members)).store == "c:1"
    other = Generation(4, (*members[:2], Member(Identity(2), "c", "c:1", 3, 8, "", False)))
    assert Generation(4, tuple(members)).prefix != other.prefix


def _machine(ranks: int) -> AgentSettings:
    settings = MembershipSettings("", "t", ranks, heartbeat_timeout_ms=900)
    return AgentSettings(settings, tuple(range(ranks)), "host", lambda rank: Path("log"))


def test_ranks_are_spread_over_local_nodes_in_order() -> None:
    machine = _machine(7)
    nodes = spread(machine, 3)
    assert [node.ranks for node in nodes] == [(0, 1), (2, 3), (4, 5, 6)]
    assert len({node.node for node in nodes}) == 3
    assert all(node.membership == machine.membership for node in nodes)


def test_fewer_ranks_than_local_nodes_take_a_node_each() -> None:
    assert [node.ranks for node in spread(_machine(2), 3)] == [(0,), (1,)]
    assert [node.ranks for node in spread(_machine(1), 3)] == [(0,)]


def test_a_run_whose_name_a_lighthouse_cannot_show_is_refused() -> None:
    with pytest.raises(MembershipError, match="'a b' cannot name a run"):
        MembershipSettings("", "a b", 1)
