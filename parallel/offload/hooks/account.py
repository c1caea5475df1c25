"""The measurements of one step: bytes sent, time by phase, time waited."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.parallel.offload.policy import (
    Amount,
    Measured,
    Moment,
    OffloadReport,
    Phases,
    StepPhases,
)
from holdfast.parallel.offload.stores import StoreStatistics


@dataclass(frozen=True, slots=True)
class EndedStep:
    """The measurements of an ended step, whose times the device may still have to come to."""

    amount: Amount
    """The amount that was to be sent."""
    eligible_bytes: int
    forward_bytes: int
    """The most eligible bytes of one forward pass."""
    written_bytes: int
    read_bytes: int
    waited_s: float
    phases: StepPhases

    def measured(self) -> Measured:
        """All measurements; the device has come to the end of the step."""
        seconds = self.phases.seconds()
        busy_s = self.phases.busy_s(self.written_bytes, self.read_bytes)
        return Measured(
            eligible_bytes=self.eligible_bytes,
            forward_bytes=self.forward_bytes,
            written_bytes=self.written_bytes,
            read_bytes=self.read_bytes,
            forward_s=seconds["forward"],
            forward_busy_s=busy_s["forward"],
            backward_s=seconds["backward"],
            backward_busy_s=busy_s["backward"],
            waited_s=self.waited_s,
        )


@dataclass(slots=True)
class Account:
    """The measurements of the step under way. Local."""

    phases: Phases = field(default_factory=Phases)
    eligible_bytes: int = 0
    sent_bytes: int = 0
    forwarded_bytes: int = 0
    waited_s: float = 0.0
    before: StoreStatistics = field(default_factory=StoreStatistics)

    def begin(self, store: StoreStatistics) -> None:
        """Begin a step. `store` has the statistics so far."""
        self.eligible_bytes = self.sent_bytes = self.forwarded_bytes = 0
        self.waited_s = 0.0
        self.before = store
        self.phases.restart()

    def ended(
        self, amount: Amount, store: StoreStatistics, forward_bytes: int, moment: Moment
    ) -> EndedStep:
        """End the step at a moment of the device.

        Args:
            amount: the amount that was to be sent.
            forward_bytes: the most eligible bytes that one forward pass saved.
        """
        return EndedStep(
            amount=amount,
            eligible_bytes=self.eligible_bytes,
            forward_bytes=forward_bytes,
            written_bytes=store.written_bytes - self.before.written_bytes,
            read_bytes=store.read_bytes - self.before.read_bytes,
            waited_s=self.waited_s,
            phases=self.phases.finish(moment, store.busy_s),
        )

    def report(self, seen: EndedStep, store: StoreStatistics, fault: str) -> OffloadReport:
        """The measurements of the ended step as a report for people."""
        busy_s = store.busy_s - self.before.busy_s
        moved = seen.written_bytes + seen.read_bytes
        return OffloadReport(
            eligible_bytes=self.eligible_bytes,
            sent_bytes=self.sent_bytes,
            read_bytes=seen.read_bytes,
            forwarded_bytes=self.forwarded_bytes,
            waited_s=self.waited_s,
            bytes_per_s=moved / busy_s if busy_s > 0 else 0.0,
            share=seen.amount.share,
            room_bytes=store.room_bytes,
            fault=fault,
        )
