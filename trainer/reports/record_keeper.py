"""The record keeper: the records of a run stay complete whichever rank writes them."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any, NamedTuple

from holdfast.parallel.output import AppendedFile, Tail
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports.digests import DigestFile, StepDigests
from holdfast.trainer.reports.events import EventFile
from holdfast.trainer.reports.metrics import StepMetrics, drop_after, last_step
from holdfast.trainer.reports.offload_metrics import scalars
from holdfast.trainer.reports.tensorboard import ScalarFile
from holdfast.trainer.run import RunDirectory, note_config

_KEPT = 512
"""Steps that every rank keeps, to complete the records of a lost writer."""


class _Step(NamedTuple):
    """A committed step, for the files of the run."""

    metrics: StepMetrics
    extra: dict[str, float]
    digests: StepDigests | None


class RecordKeeper:
    """One rank's part in the records: the writer writes, the others stand by. Local.

    No method raises OSError: what the disk refuses is written later.
    """

    def __init__(
        self, run: RunDirectory, events: EventFile, *, tensorboard: bool, first: int, writes: bool
    ) -> None:
        """Open the records on the rank that writes them.

        Args:
            events: the events of this process.
            first: the number of steps done already; records of later steps are dropped.
        """
        self._run, self._events, self._tensorboard = run, events, tensorboard
        self._recent: deque[_Step] = deque(maxlen=_KEPT)
        self._written = first
        """The last step in the records."""
        self._metrics: AppendedFile | None = None
        self._scalars: ScalarFile | None = None
        self._digests: DigestFile | None = None
        if writes:
            self._drop_after(first)
            self._open()

    @property
    def writes(self) -> bool:
        """Whether this rank writes the records."""
        return self._metrics is not None

    @property
    def waits(self) -> bool:
        """Whether this rank has steps that the disk has not taken, so that no one can read them."""
        return self._metrics is not None and self._metrics.waits

    def change(self, *, writes: bool) -> None:
        """Begin or end to write. A new writer completes the records of the last one."""
        if writes and self._metrics is None:
            self._open()
            for step in tuple(self._recent):
                self._write(step)
        elif not writes:
            self.close()

    def roll_back(self, step: int) -> None:
        """Forget the steps after `step`, which the run repeats."""
        self._recent.clear()
        if self._metrics is None:
            self._written = min(self._written, step)
            return
        self.close()
        self._drop_after(step)
        self._open()

    def step(
        self, metrics: StepMetrics, extra: dict[str, float], digests: StepDigests | None = None
    ) -> None:
        """Record a committed step.

        Args:
            extra: further scalars for TensorBoard, by name.
            digests: those of the step; None: it is none of those that have any.
        """
        self._recent.append(_Step(metrics, extra, digests))
        self._write(self._recent[-1])

    def event(self, event: str, **fields: Any) -> None:
        """Record an event, on the writing rank."""
        if self._metrics is not None:
            self._events.append(event, **fields)

    def note_config(self, config: RunConfig) -> None:
        """Write the configuration of a run that removes samples, on the writing rank."""
        try:
            note_config(self._run, config)
        except OSError as error:
            self._events.word.say(f"{self._run.config} cannot be written: {error}")

    def close(self) -> None:
        """Close the files; may be called again."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._scalars is not None:
            self._scalars.close()
            self._scalars = None
        if self._digests is not None:
            self._digests.close()
            self._digests = None

    def _drop_after(self, step: int) -> None:
        """Cut the records; a file that cannot be cut keeps its lines, which are not repeated."""
        with contextlib.suppress(OSError):
            drop_after(self._run.metrics, step)
        DigestFile.forget_after(self._run.digests, step)

    def _open(self) -> None:
        """Begin to write after the last step in the records."""
        self._metrics = AppendedFile(self._run.metrics, self._events.word, Tail.SET_ASIDE)
        with contextlib.suppress(OSError):
            self._written = last_step(self._run.metrics)

    def _write(self, step: _Step) -> None:
        metrics = step.metrics
        if self._metrics is None or metrics.step <= self._written:
            return
        if step.digests is not None:
            if self._digests is None:
                self._digests = DigestFile(self._run.digests, self._events.word)
            self._digests.step(step.digests)
        self._metrics.append(metrics.line())
        if self._tensorboard:
            self._write_scalars(metrics, step.extra)
        self._written = metrics.step

    def _write_scalars(self, metrics: StepMetrics, extra: dict[str, float]) -> None:
        if self._scalars is None:
            folder, before = self._run.tensorboard, metrics.step - 1
            self._scalars = ScalarFile(folder, before, self._events.word)
        offload = scalars(metrics.offload) if metrics.offload is not None else {}
        self._scalars.step(
            metrics.step,
            {
                "loss_metrics/global_avg_loss": metrics.loss,
                "grad_norm": metrics.grad_norm,
                "lr": metrics.lr,
                "throughput(tps)": metrics.tokens_per_s,
                "time_metrics/end_to_end(s)": metrics.step_s,
                **extra,
                **offload,
            },
        )
