"""What one worker's loop and recovery do when others come or go: the others are fakes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from holdfast.elastic.generation import Identity
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.parallel.errors import PeerLost, Stopped
from holdfast.parallel.plan import plan_to_data
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step import Requests
from support.runs.fake_cluster import (
    STEPS,
    FakeSession,
    Turn,
    lost,
    numbers,
    worker,
)


def test_a_newcomer_is_given_state_beside_the_steps_and_then_takes_its_place(
    config: RunConfig,
) -> None:
    joining = MembershipEvent("joining", Identity(4), "a new worker wants to take part")
    session = FakeSession()
    made = worker(config, [Turn(joined=lost(4)), Turn()], session=session)
    made.membership.wanted = (joining,)
    # All know of it by the vote of step 1; what it needs has come by the vote of step 4.
    session.requests = lambda step: Requests(change=step == 0, filling=step < 3)
    made.loop.run()
    first, admitted, placed = session.changes
    assert (first.after.ranks, admitted.after.ranks) == ((0, 1, 2, 3), (0, 1, 2, 3, 4))
    assert session.steps[0] == (0, True, False)
    # While its state comes, it is no reason for another change.
    assert [change for _, change, _ in session.steps[1:4]] == [False, False, False]
    assert numbers(session) == list(range(STEPS))
    spares = admitted.after.ranks, placed.recovery.filled
    assert spares == ((0, 1, 2, 3, 4), True)
    assert placed.recovery.steps == 4
    assert 4 not in session.training.plan.stage_replicas.spares
    assert not session.training.plan.incoming


def test_a_worker_without_state_learns_the_active_plan_from_a_holder(config: RunConfig) -> None:
    holder = worker(config, [Turn(joined=lost(4))])
    holder.recovery.recover(urgent=False)
    held = holder.recovery.training
    assert held is not None
    holder.recovery.recover(urgent=False)
    told = holder.membership.the_store.values["plan"]
    assert json.loads(told) == json.loads(json.dumps(plan_to_data(held.plan)))
    turn = Turn(report=lambda own: replace(own, active=1, decided=2, updated=2, updates=2))
    newcomer = worker(config, [turn], rank=4)
    newcomer.membership.the_store.values["plan"] = told
    change = newcomer.recovery.recover(urgent=False)
    assert change.plan_before.stage_replicas.ranks == (0, 1, 2, 3)
    assert change.recovery.fresh == {4}
    assert newcomer.recovery.training is not None
    assert newcomer.recovery.training.progress.decided == 2


def test_a_worker_that_leaves_hands_its_state_over_and_stops(config: RunConfig) -> None:
    session = FakeSession(requests=lambda step: Requests(change=step == 1))
    made = worker(config, [Turn()], rank=3, session=session)
    event = MembershipEvent("leaving", Identity(3), "its node is shut down")
    made.membership.wanted = (event,)
    with pytest.raises(Stopped, match="handed its state over"):
        made.loop.run()
    assert session.steps == [(0, True, True), (1, True, True)]
    assert made.membership.calls[1]["leaving"]
    assert 3 not in made.transport.transitions[1].after.stage_replicas.ranks
    assert made.recovery.training is None


def test_others_forget_a_worker_that_has_left_at_once(config: RunConfig) -> None:
    session = FakeSession(requests=lambda step: Requests(change=step in (1, 2)))
    made = worker(config, [Turn(leaving=lost(3)), Turn(lost(3))], session=session)
    made.loop.run()
    assert made.builder.loads == [None]
    assert [change for _, change, _ in session.steps[2:4]] == [True, False]
    assert session.changes[1].recovery.staying == (0, 1, 2)
    assert session.changes[2].after.ranks == (0, 1, 2)
    assert session.finished


def test_the_end_of_a_worker_that_has_handed_its_state_over_interrupts_no_step(
    config: RunConfig,
) -> None:
    made = worker(config, [Turn(leaving=lost(3))])
    made.recovery.recover(urgent=False)
    made.recovery.recover(urgent=False)
    assert made.membership.urgent is not None
    made.membership.urgent(MembershipEvent("ended", Identity(3), "exited with code 3"))
    made.interruption.check()
    made.membership.urgent(MembershipEvent("ended", Identity(2), "killed by SIGKILL"))
    with pytest.raises(PeerLost, match="rank 2: killed by SIGKILL"):
        made.interruption.check()
    assert made.transport.aborted == ["rank 2: killed by SIGKILL"]
