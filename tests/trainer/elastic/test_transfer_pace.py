"""When a background transfer may end: the question, and the rank that asks it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from holdfast.elastic.history import MembershipHistory, RecordedChange
from holdfast.trainer.elastic.transfer_pace import MembershipPace


@dataclass
class Membership:
    """Counts how often it is asked."""

    agrees: bool
    asked: int = 0

    def can_agree(self) -> bool:
        self.asked += 1
        return self.agrees


def training_at(decided: int, ranks: tuple[int, ...] = (3, 5)) -> Any:
    return SimpleNamespace(
        progress=SimpleNamespace(decided=decided),
        plan=SimpleNamespace(stage_replicas=SimpleNamespace(ranks=ranks)),
    )


def test_the_first_rank_of_the_plan_asks_whether_ranks_can_agree() -> None:
    membership = Membership(agrees=False)
    assert not MembershipPace(training_at(1), 3, membership).may_end()
    assert membership.asked == 1


def test_other_ranks_do_not_ask() -> None:
    membership = Membership(agrees=False)
    assert MembershipPace(training_at(1), 5, membership).may_end()
    assert membership.asked == 0


def test_a_run_that_repeats_none_must_not_end() -> None:
    assert MembershipPace(training_at(1), 3, Membership(agrees=True)).must_end() is None


def test_a_repeated_run_ends_after_the_same_step() -> None:
    change = RecordedChange(7, False, True, lost=(), leaving=(), joined=(5,), plan={})
    history = MembershipHistory(0, {}, (change,), last_step=None, faults=())
    membership = Membership(agrees=True)
    pace = [MembershipPace(training_at(s), 3, membership, history) for s in (5, 6)]
    assert [found.must_end() for found in pace] == [False, True]
