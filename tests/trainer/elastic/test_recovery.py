"""The decisions of one worker's loop and recovery, with the others, the state and the clock as
fakes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from torch.distributed import DistNetworkError

from holdfast.elastic.generation import Generation, Identity, Member
from holdfast.elastic.history import MembershipHistory, RecordedChange
from holdfast.elastic.membership_events import MembershipEvent
from holdfast.parallel.errors import Minority, PeerLost, TooFewRanks
from holdfast.parallel.plan import Plan, would_move_layers
from holdfast.trainer.config import Removal, RunConfig
from holdfast.trainer.elastic.interruption import Interruption, await_word
from holdfast.trainer.elastic.transition import BETWEEN_STEPS, WITHIN_STEP, plan_transition
from holdfast.trainer.elastic.worker_status import (
    RecoveryPlan,
    WorkerStatus,
    plan_recovery,
    status_from_data,
    status_to_data,
)
from holdfast.trainer.step import (
    UNKNOWN_MEMORY,
    DeviceMemory,
    Requests,
    plan_of,
    room_of,
)
from support.processes.fake_clock import FakeClock
from support.runs.fake_cluster import (
    OUTCOME,
    STEPS,
    FakeSession,
    FakeStore,
    Turn,
    Worker,
    lost,
    numbers,
    worker,
)
from support.runs.plans import first_plan


def with_elastic(config: RunConfig, **keys: object) -> RunConfig:
    elastic = msgspec.structs.replace(config.elastic, **keys)
    return msgspec.structs.replace(config, elastic=elastic)


def test_without_a_loss_all_steps_are_done_in_one_generation(config: RunConfig) -> None:
    made = worker(config, [])
    made.loop.run()
    assert numbers(made.session) == list(range(STEPS))
    assert made.session.finished
    assert made.builder.loads == [None]  # the first generation has no state
    assert [call["phase"] for call in made.membership.calls] == [BETWEEN_STEPS]


def test_a_loss_before_the_vote_repeats_the_step_without_the_lost_rank(config: RunConfig) -> None:
    made = worker(config, [Turn(lost(3))], session=FakeSession(lose_at={2: "before"}))
    made.loop.run()
    assert numbers(made.session) == [0, 1, 2, 2, 3, 4, 5]
    _, change = made.session.changes
    assert change.recovery.steps == 2
    assert change.from_checkpoint is None
    assert change.after.ranks == (0, 1, 2)
    assert made.recovery.training is made.session.training
    assert made.session.training.plan.stage_replicas.ranks == (0, 1, 2)
    assert made.transport.aborted  # what waits for the lost rank is freed
    made.interruption.check()  # the new generation is not interrupted by the end of the old
    assert made.saves.log.index("abort") < len(made.saves.log) - 1 - made.saves.log[::-1].index(
        "cancel"
    )
    call = made.membership.calls[1]
    assert (call["step"], call["phase"], call["urgent"]) == (2, WITHIN_STEP, True)


def test_a_loss_after_the_vote_of_others_finishes_the_step_here_too(config: RunConfig) -> None:
    ahead = Turn(
        lost(3), report=lambda own: replace(own, decided=3, updated=3, updates=3, outcome=OUTCOME)
    )
    made = worker(config, [ahead], session=FakeSession(lose_at={2: "before"}))
    made.loop.run()
    assert numbers(made.session) == [0, 1, 2, 3, 4, 5]
    _, change = made.session.changes
    assert (change.recovery.steps, change.recovery.outcome) == (3, OUTCOME)
    assert made.session.reported[-1] is change  # the step is reported from what the others know


def test_a_step_that_was_decided_here_alone_is_finished_by_the_recovery(config: RunConfig) -> None:
    behind = Turn(lost(3), report=lambda own: replace(own, decided=2, updated=2, updates=2))
    made = worker(config, [behind], session=FakeSession(lose_at={2: "after"}))
    active: list[Any] = []
    agree = made.membership.agree

    def remember(**call: object) -> object:
        active.append(made.recovery.training)
        return agree(**call)

    made.membership.agree = remember  # type: ignore[method-assign,assignment]
    made.loop.run()
    assert active[1].rates == [config.rate_of(2)]
    assert numbers(made.session) == [0, 1, 2, 3, 4, 5]
    assert made.session.changes[1].recovery.steps == 3


def test_a_rank_that_has_not_gone_back_as_others_have_does_so_in_the_recovery(
    config: RunConfig,
) -> None:
    """A rank is lost just as the run goes back from step 3 to step 1."""

    def gone_back(status: WorkerStatus) -> WorkerStatus:
        removals = (Removal(start=1, samples=[5]),)
        return replace(status, rewinds=1, decided=1, updated=1, updates=1, removals=removals)

    turn = Turn(lost(3), report=gone_back)
    made = worker(config, [turn], session=FakeSession(lose_at={3: "before"}))
    went: list[Any] = []
    made.session.at_loss = lambda training: went.append(training)
    made.loop.run()
    assert numbers(made.session) == [0, 1, 2, 3, 1, 2, 3, 4, 5]
    (here,) = went
    assert here.config.data.without == [Removal(start=1, samples=[5])]
    assert here.rates == []
    recovery = made.session.changes[1].recovery
    assert (recovery.steps, recovery.rewinds, recovery.updates) == (1, 1, 1)


@pytest.mark.parametrize("error", [PeerLost, DistNetworkError])  # of a rank, of the store
@pytest.mark.parametrize("place", ["connect", "build", "saves"])
def test_a_loss_while_state_moves_begins_the_change_again_from_the_active_state(
    config: RunConfig, place: str, error: type[Exception]
) -> None:
    made = worker(
        config, [Turn(lost(3)), Turn(lost(2))], session=FakeSession(lose_at={2: "before"})
    )
    made.recovery.recover(urgent=False)  # the first generation
    made.membership.script.insert(0, Turn())
    made.failures.at.append(place)
    made.failures.error = error
    made.membership.script.pop(0)
    made.session.training = active = made.recovery.training
    assert active is not None
    change = made.recovery.recover(urgent=False)
    assert change.after.ranks == (0, 1)
    assert [call["phase"] for call in made.membership.calls] == [
        BETWEEN_STEPS,
        BETWEEN_STEPS,
        WITHIN_STEP,
    ]
    # Of the change that failed, nothing is active: both agreements tell of generation 1.
    assert [status.active for status in made.membership.statuses] == [0, 1, 1]
    assert made.recovery.generation is change.after
    assert change.before is not None
    assert change.before.number == 1


def test_what_others_have_activated_is_activated_from_what_was_prepared(config: RunConfig) -> None:
    went_on = Turn(lost(2), report=lambda own: replace(own, active=2, prepared=0))
    made = worker(config, [Turn(lost(3)), went_on])
    made.recovery.recover(urgent=False)
    made.failures.at.append("barrier")
    change = made.recovery.recover(urgent=True)
    assert made.membership.statuses[2].active == 1
    assert made.membership.statuses[2].prepared == 2
    assert change.recovery.active == 2
    assert change.plan_before.stage_replicas.ranks == (
        0,
        1,
        2,
    )  # the plan that was only prepared here
    assert change.before is not None
    assert change.before.number == 2
    assert made.builder.loads == [None]


def test_what_was_prepared_is_dropped_where_no_rank_has_activated_it(config: RunConfig) -> None:
    made = worker(config, [Turn(lost(3)), Turn(lost(2))])
    made.recovery.recover(urgent=False)
    made.failures.at.append("barrier")
    change = made.recovery.recover(urgent=True)
    assert change.recovery.active == 1
    assert change.plan_before.stage_replicas.ranks == (0, 1, 2, 3)
    assert change.before is not None
    assert change.before.number == 1


def test_two_losses_in_a_row_cost_two_changes_and_no_step(config: RunConfig) -> None:
    session = FakeSession(lose_at={2: "before", 3: "before"})
    made = worker(config, [Turn(lost(3)), Turn(lost(2))], session=session)
    made.loop.run()
    assert numbers(session) == [0, 1, 2, 2, 3, 3, 4, 5]
    assert [change.after.ranks for change in session.changes] == [(0, 1, 2, 3), (0, 1, 2), (0, 1)]
    assert made.builder.loads == [None]


def test_what_others_say_as_they_leave_a_generation_does_not_end_the_next(
    config: RunConfig,
) -> None:
    """They say it while this worker gathers what it reports to the agreement."""
    made = worker(config, [Turn(lost(3))], session=FakeSession(lose_at={2: "before"}))
    gather = made.recovery._status

    def gather_and_hear(**how: bool) -> WorkerStatus:
        status = gather(**how)
        if made.membership.urgent is not None and not made.membership.is_hushed:
            made.membership.urgent(MembershipEvent("disturbed", Identity(2), "within a step"))
        return status

    made.recovery._status = gather_and_hear  # type: ignore[method-assign]
    made.loop.run()
    assert len(made.session.changes) == 2
    made.interruption.check()


def test_too_few_ranks_end_the_worker_and_are_not_tried_again(config: RunConfig) -> None:
    refused = Turn(error=Minority("1 rank is left, elastic.min_ranks = 2"))
    made = worker(config, [refused], session=FakeSession(lose_at={2: "before"}))
    with pytest.raises(Minority):
        made.loop.run()
    assert numbers(made.session) == [0, 1, 2]
    assert len(made.membership.calls) == 2


def test_corrupt_state_is_not_used_and_an_older_checkpoint_is_loaded(config: RunConfig) -> None:
    session = FakeSession(corrupt_at={4})
    made = worker(with_elastic(config, verify_every=2), [Turn()], session=session, checkpoint=2)
    made.loop.run()
    assert numbers(session) == [0, 1, 2, 3, 2, 3, 4, 5]
    assert [status.trusted for status in made.membership.statuses] == [True, False]
    assert made.builder.loads == [None, 2]  # nothing newer than the last sound comparison
    assert session.changes[1].from_checkpoint == 2
    assert made.recovery.sound_until is None
    assert session.finished


def test_without_a_holder_of_some_block_the_newest_checkpoint_is_loaded(config: RunConfig) -> None:
    made = worker(
        config, [Turn(lost(1, 2, 3))], session=FakeSession(lose_at={4: "before"}), checkpoint=3
    )
    made.loop.run()
    _, change = made.session.changes
    assert change.recovery.holders == (0,)
    assert change.from_checkpoint == 3
    assert made.builder.loads == [None, None]
    assert numbers(made.session) == [0, 1, 2, 3, 4, 3, 4, 5]


def test_with_a_shadow_of_every_block_no_checkpoint_is_loaded(config: RunConfig) -> None:
    made = worker(config, [Turn(lost(2))], session=FakeSession(lose_at={4: "before"}), checkpoint=3)
    made.loop.run()
    assert made.session.changes[1].from_checkpoint is None
    assert numbers(made.session) == [0, 1, 2, 3, 4, 4, 5]


def test_a_loss_while_the_state_after_a_change_is_compared_is_a_loss_like_any_other(
    config: RunConfig,
) -> None:
    session = FakeSession(lose_at={2: "before"}, interrupt_compare=1)
    made = worker(config, [Turn(lost(3)), Turn(lost(2))], session=session)
    made.loop.run()
    assert [call["urgent"] for call in made.membership.calls] == [False, True, True]
    assert len(made.transport.aborted) == 2
    # The change that was not compared is recorded all the same, before the next.
    assert [(change.after.number, urgent) for change, urgent in session.recorded] == [
        (1, False),
        (2, True),
        (3, True),
    ]
    assert session.reported == [session.changes[0], session.changes[2]]
    assert numbers(session) == [0, 1, 2, 2, 3, 4, 5]


def test_a_loss_while_the_step_before_a_change_is_evaluated_is_a_loss_like_any_other(
    config: RunConfig,
) -> None:
    session = FakeSession(lose_at={2: "after"}, interrupt_evaluation=1)
    made = worker(config, [Turn(lost(3)), Turn(lost(2))], session=session)
    made.loop.run()
    assert [call["urgent"] for call in made.membership.calls] == [False, True, True]
    assert session.reported == [session.changes[0], session.changes[2]]
    assert numbers(session) == [0, 1, 2, 3, 4, 5]


def test_a_repeated_run_changes_at_the_steps_of_the_first_and_waits_for_those_who_joined(
    config: RunConfig,
) -> None:
    def change(step: int, *, joined: tuple[int, ...] = ()) -> RecordedChange:
        return RecordedChange(step, False, False, (), (), joined, {}, filled=step == 5)

    history = MembershipHistory(0, {}, (change(2, joined=(4,)), change(5)), None, ())
    session = FakeSession(requests=lambda step: Requests(change=step in (1, 4)))
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(len(session.steps))
        if len(naps) == 3:
            made.membership.wanted = (MembershipEvent("joining", Identity(4), "wants to join"),)

    made = worker(
        config, [Turn(joined=lost(4)), Turn()], session=session, history=history, sleep=sleep
    )
    made.loop.run()
    assert naps == [1, 1, 1]  # before the second step, and no longer than until it wants to join
    assert [step for step, change, _ in session.steps if change] == [1, 4]
    assert [c.recovery.steps for c in session.changes] == [0, 2, 5]


def test_layers_move_between_steps_only() -> None:
    before = first_plan(data=2, pipeline=2)

    def after(phase: str) -> Plan:
        statuses = {r: WorkerStatus(active=1, decided=3, updated=3, updates=3) for r in (0, 1, 2)}
        members = tuple(
            Member(Identity(r), f"node-{r}", "h:1", 1, 3, phase, False, status_to_data(status))
            for r, status in statuses.items()
        )
        generation = Generation(2, members)
        recovery = plan_recovery(generation)
        return plan_transition(generation, recovery, before, redundancy=1).after

    chunks = range(len(before.placement))
    layers = [before.layers_of(chunk) for chunk in chunks]
    within, between = after(WITHIN_STEP), after(BETWEEN_STEPS)
    assert [within.layers_of(chunk) for chunk in chunks] == layers
    assert would_move_layers(within)
    assert not within.incoming
    assert between.incoming  # the state of layers that move to another stage comes beside the steps


def test_a_word_is_waited_for_while_the_generation_stands_and_no_longer_than_a_minute() -> None:
    store, interruption, clock = FakeStore(), Interruption(), FakeClock(now_s=0.0)

    def wait() -> bytes:
        return await_word(store, "plan", interruption, clock=clock, sleep=clock.sleep)  # type: ignore[arg-type]

    with pytest.raises(PeerLost, match="no rank has given its plan within 60 s"):
        wait()
    assert clock() == pytest.approx(60.0, abs=0.1)
    interruption.begin("rank 1: killed")
    interruption.begin("rank 2: killed")
    with pytest.raises(PeerLost, match="rank 1: killed"):
        wait()
    store.set("plan", "{}")
    assert wait() == b"{}"


def test_a_status_survives_the_way_through_a_message_whose_keys_stay() -> None:
    status = WorkerStatus(
        active=3,
        prepared=4,
        decided=7,
        updated=6,
        updates=5,
        complete=False,
        filled=False,
        outcome=OUTCOME,
        operations=("send",),
        connected=False,
        rewinds=2,
        removals=(Removal(start=3, samples=[5]),),
        trusted=False,
    )
    told = json.loads(json.dumps(status_to_data(status)))
    assert (told["installed"], told["ready"]) == (3, 4)
    assert replace(status_from_data(told), operations=("send",)) == status


def test_a_smaller_replica_must_fit_into_the_least_memory_of_a_rank() -> None:
    """Ranks of one machine share its memory; a GPU is a rank's own."""

    def plan_of_memory(**memory: DeviceMemory) -> RecoveryPlan:
        statuses = {rank: WorkerStatus(active=1, memory=found) for rank, found in memory.items()}
        members = tuple(
            Member(
                Identity(number),
                f"node-{number}",
                "h:1",
                1,
                0,
                WITHIN_STEP,
                False,
                status_to_data(status),
                machine=machine[0],
            )
            for number, (machine, status) in enumerate(statuses.items())
        )
        return plan_recovery(Generation(2, members))

    host = DeviceMemory(900, is_shared=True)
    found = plan_of_memory(a1=host, a2=host, a3=host, b1=DeviceMemory(400, is_shared=True))
    assert found.rank_bytes == 300
    assert plan_of_memory(a1=DeviceMemory(80), a2=DeviceMemory(96)).rank_bytes == 80
    assert plan_of_memory(a1=UNKNOWN_MEMORY).rank_bytes == 0


def test_the_memory_of_a_rank_is_its_share_unless_the_configuration_says_less(
    config: RunConfig,
) -> None:
    plan = plan_of(config)
    assert room_of(config, 0) is None
    wide, narrow = room_of(config, 1 << 40), room_of(config, 1)
    assert wide is not None
    assert narrow is not None
    assert (wide(plan, 0), narrow(plan, 0)) == (True, False)
    said = room_of(with_elastic(config, rank_memory_gib=2**-20), 1 << 40)
    assert said is not None
    assert not said(plan, 0)


def test_ranks_that_are_too_few_for_their_memory_wait_for_others(config: RunConfig) -> None:
    parallel = msgspec.structs.replace(config.parallel, tensor=2, data=1)
    numerics = msgspec.structs.replace(config.numerics, tensor_shards=2)
    small = msgspec.structs.replace(
        with_elastic(config, rank_memory_gib=2**-20), parallel=parallel, numerics=numerics
    )
    naps: list[float] = []

    def run(script: list[Turn], nap_s: float = 0.0) -> Worker:
        return worker(
            small,
            script,
            session=FakeSession(lose_at={2: "before"}),
            sleep=naps.append,
            clock=lambda: nap_s * len(naps),
        )

    made = run([Turn(lost(1)), Turn(), Turn(joined=lost(1))])
    made.loop.run()
    assert len(naps) == 2
    assert numbers(made.session) == [0, 1, 2, 2, 3, 4, 5]
    assert made.session.changes[1].after.ranks == (0, 1)
    alone = run([Turn(lost(1)), *(Turn() for _ in range(9))], nap_s=small.elastic.apart_s / 4)
    with pytest.raises(TooFewRanks, match=r"1 ranks are left.*does not fit into their memory"):
        alone.loop.run()
