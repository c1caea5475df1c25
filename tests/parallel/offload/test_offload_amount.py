"""How much is sent: the amount follows what is seen of the drive and of the phases of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest

from holdfast.parallel.offload.policy.amount import (
    MIB,
    Amount,
    Bounds,
    Measured,
    drive_life_years,
    next_amount,
)
from holdfast.parallel.offload.policy.phases import (
    Begin,
    HostMoment,
    Moment,
    Phase,
    Phases,
    StepPhases,
)

SEEN = Measured(
    eligible_bytes=1000 * MIB,
    forward_bytes=1000 * MIB,
    written_bytes=1000 * MIB,
    read_bytes=1000 * MIB,
    forward_s=1.0,
    forward_busy_s=0.5,
    backward_s=2.0,
    backward_busy_s=0.5,
    waited_s=0.0,
)


ALL = Bounds()


def converged(seen: Callable[[Amount], Measured], bounds: Bounds = ALL) -> Amount:
    """The amount after many steps."""
    amount = Amount(share=bounds.most_share)
    for _ in range(40):
        amount = next_amount(amount, seen(amount), bounds)
    return amount


def drive(
    write_s: float, read_s: float, waits: Callable[[float], float] = lambda share: 0.0
) -> Callable[[Amount], Measured]:
    """What is seen of a drive that takes so long for everything."""

    def seen(amount: Amount) -> Measured:
        share = amount.share
        return replace(
            SEEN,
            written_bytes=int(SEEN.eligible_bytes * share),
            read_bytes=int(SEEN.eligible_bytes * share),
            forward_busy_s=min(1.0, write_s * share),
            backward_busy_s=min(2.0, read_s * share),
            waited_s=waits(share),
        )

    return seen


def test_a_fast_drive_gets_everything() -> None:
    assert converged(drive(0.5, 0.5)).share == 1.0
    assert converged(drive(0.5, 0.5), Bounds(0.0, 0.6)).share == 0.6


def test_a_slow_drive_gets_what_nine_tenths_of_the_time_can_carry() -> None:
    assert converged(drive(4.0, 4.0)).share == pytest.approx(0.9 / 4)
    assert converged(drive(0.5, 8.0)).share == pytest.approx(0.9 * 2 / 8)
    assert converged(drive(4.0, 4.0), Bounds(0.5, 1.0)).share == 0.5


def test_waiting_lowers_the_amount_until_nothing_is_waited_for() -> None:
    amount = converged(drive(0.1, 0.1, waits=lambda share: 1.0 if share > 0.5 else 0.0))
    assert 0.3 < amount.share <= 0.75


def test_a_drive_that_recovers_is_noticed() -> None:
    amount = converged(drive(1000.0, 1000.0))
    assert amount.share == pytest.approx(0.02)
    for _ in range(12):
        amount = next_amount(amount, drive(0.5, 0.5)(amount), Bounds())
    assert amount.share == 1.0


def test_the_tail_lasts_as_long_as_a_round_trip() -> None:
    amount = next_amount(Amount(), SEEN, Bounds())
    assert amount.window_bytes == 1000 * MIB // 16
    # A window takes 1/32 s out and as long back; meanwhile a sixteenth of 500 MiB/s is asked for.
    assert amount.tail_bytes == pytest.approx(500 * MIB / 16, rel=0.01)
    slow = next_amount(Amount(), replace(SEEN, written_bytes=MIB, read_bytes=MIB), Bounds())
    assert slow.tail_bytes == SEEN.forward_bytes // 4


@dataclass
class QueuedMoment:
    """A moment that a GPU comes to later than the host."""

    at_s: float
    past: bool = True

    def query(self) -> bool:
        return self.past

    def elapsed_time(self, end_event: QueuedMoment) -> float:
        return (end_event.at_s - self.at_s) * 1e3


def noted(moment: Callable[[float], Moment]) -> StepPhases:
    phases = Phases()
    notes: list[tuple[Phase, float, float]] = [
        ("forward", 1.0, 0.5),
        ("forward", 2.0, 1.0),
        ("backward", 3.0, 1.5),
        ("backward", 5.0, 2.0),
        ("forward", 6.0, 2.5),
    ]
    for phase, at_s, busy_s in notes:
        phases.at(phase, partial(moment, at_s), partial(float, busy_s))
    return phases.finish(moment(7.0), 3.0)


def test_phases_count_time_and_transfers() -> None:
    step = noted(lambda at_s: HostMoment(lambda: at_s))
    assert step.is_past
    assert step.seconds() == {"forward": 3.0, "backward": 3.0}
    assert step.busy_s(1, 1) == {"forward": 1.5, "backward": 1.0}


def test_transfers_beside_a_queue_count_by_their_direction() -> None:
    step = noted(QueuedMoment)
    assert step.seconds() == {"forward": 3.0, "backward": 3.0}
    assert step.busy_s(3, 1) == {"forward": 2.5 * 3 / 4, "backward": 2.5 / 4}
    assert not StepPhases((Begin("backward", QueuedMoment(1.0, past=False), 0.0),)).is_past


def test_time_that_was_waited_hides_nothing() -> None:
    """The share is halved until compute hides the drive, however long a step waited."""
    amount, steps = Amount(), 0
    while amount.share > 0.05:
        waited_s = 40.0 * amount.share
        seen = replace(
            SEEN, backward_s=2.0 + waited_s, backward_busy_s=2.0 + waited_s, waited_s=waited_s
        )
        amount = next_amount(amount, seen, ALL)
        steps += 1
    assert steps <= 5


def test_the_life_of_a_drive() -> None:
    year = 365.25 * 86400
    assert drive_life_years(1e15, 1e15 / year) == pytest.approx(1.0)
    assert drive_life_years(0, 1.0) is None
    assert drive_life_years(1.0, 0) is None
