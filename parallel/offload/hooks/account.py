"""The measurements of one step: bytes sent, time by phase, time waited."""

from __future__ import annotations

from dataclasses import dataclass, field

from holdfast.parallel.offload.policy import Amount, Measured, OffloadReport, Phases
from holdfast.parallel.offload.stores import StoreStatistics


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
        self.phases.restart(store.busy_s)

    def measured(self, store: StoreStatistics, forward_bytes: int) -> Measured:
        """End the step; `forward_bytes` is the most eligible bytes that one forward pass saved."""
        self.phases.finish(store.busy_s)
        seconds, busy_s = self.phases.seconds, self.phases.busy_s
        return Measured(
            eligible_bytes=self.eligible_bytes,
            forward_bytes=forward_bytes,
            written_bytes=store.written_bytes - self.before.written_bytes,
            read_bytes=store.read_bytes - self.before.read_bytes,
            forward_s=seconds["forward"],
            forward_busy_s=busy_s["forward"],
            backward_s=seconds["backward"],
            backward_busy_s=busy_s["backward"],
            waited_s=self.waited_s,
        )

    def report(
        self, seen: Measured, amount: Amount, store: StoreStatistics, fault: str
    ) -> OffloadReport:
        """The measurements of the ended step as a report for people."""
        busy_s = seen.forward_busy_s + seen.backward_busy_s
        moved = seen.written_bytes + seen.read_bytes
        return OffloadReport(
            eligible_bytes=self.eligible_bytes,
            sent_bytes=self.sent_bytes,
            read_bytes=seen.read_bytes,
            forwarded_bytes=self.forwarded_bytes,
            waited_s=self.waited_s,
            bytes_per_s=moved / busy_s if busy_s > 0 else 0.0,
            share=amount.share,
            room_bytes=store.room_bytes,
            fault=fault,
        )
