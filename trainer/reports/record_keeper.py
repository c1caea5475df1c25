"""The record keeper: the records of a run stay complete whichever rank writes them."""

from __future__ import annotations

from collections import deque
from typing import Any

from holdfast.trainer.reports.metrics import RunRecords, StepMetrics, drop_after, last_step
from holdfast.trainer.run import RunDirectory

_KEPT = 8
"""Steps that every rank keeps, to complete the records of a lost writer."""


class RecordKeeper:
    """One rank's part in the records: the writer writes, the others stand by. Local."""

    def __init__(self, run: RunDirectory, *, tensorboard: bool, first: int, writes: bool) -> None:
        """Open the records on the rank that writes them.

        Args:
            first: the number of steps done already; records of later steps are dropped.
        """
        self._run, self._tensorboard = run, tensorboard
        self._recent: deque[tuple[StepMetrics, dict[str, float]]] = deque(maxlen=_KEPT)
        self._written = first
        """The last step in the records."""
        self._records: RunRecords | None = None
        if writes:
            if run.metrics.exists():
                drop_after(run.metrics, first)
            self._open()
            self._written = last_step(run.metrics)

    @property
    def writes(self) -> bool:
        """Whether this rank writes the records."""
        return self._records is not None

    def change(self, *, writes: bool) -> None:
        """Begin or end to write. A new writer completes the records of the last one."""
        if writes and self._records is None:
            self._open()
            self._written = last_step(self._run.metrics)
            for metrics, extra in tuple(self._recent):
                self._write(metrics, extra)
        elif not writes:
            self.close()

    def roll_back(self, step: int) -> None:
        """Forget the steps after `step`, which the run repeats."""
        self._recent.clear()
        self._written = min(self._written, step)
        if self._records is not None:
            self._records.close()
            drop_after(self._run.metrics, step)
            self._open()

    def step(self, metrics: StepMetrics, extra: dict[str, float]) -> None:
        """Record a committed step.

        Args:
            extra: further scalars for TensorBoard, by name.
        """
        self._recent.append((metrics, extra))
        self._write(metrics, extra)

    def event(self, event: str, **fields: Any) -> None:
        """Record an event, on the writing rank."""
        if self._records is not None:
            self._records.event(event, **fields)

    def close(self) -> None:
        """Close the files; may be called again."""
        if self._records is not None:
            self._records.close()
            self._records = None

    def _open(self) -> None:
        tensorboard = self._run.tensorboard if self._tensorboard else None
        self._records = RunRecords(self._run.metrics, self._run.events, tensorboard)

    def _write(self, metrics: StepMetrics, extra: dict[str, float]) -> None:
        if self._records is not None and metrics.step > self._written:
            self._records.step(metrics, extra)
            self._written = metrics.step
