"""metrics.jsonl, events.jsonl and TensorBoard: the records that other programs read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.trainer.reports.offload_metrics import OffloadMetrics, scalars


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One committed step; a line of metrics.jsonl."""

    step: int
    """Counted from 1."""
    loss: float
    loss_hex: str
    grad_norm: float
    grad_norm_hex: str
    lr: float
    tokens: int
    """The tokens trained on since the run began, this step included."""
    step_s: float
    tokens_per_s: float
    world: int
    generation: int
    offload: OffloadMetrics | None = None
    """Given if activations are offloaded; otherwise the line has no such key."""


class JsonLines:
    """A file of one JSON object per line, in whole lines. One process writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists():
            _cut_torn_line(path)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Add one line; numbers that JSON lacks become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        self._file.close()


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Add one event, from any process."""
    append_events(path, [(event, fields)])


def append_events(path: Path, events: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Add events, from any process; in one write, so that lines never mix."""
    now = time.time()
    lines = (json.dumps({"time": now, "event": event, **fields}) for event, fields in events)
    with path.open("ab", buffering=0) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _cut_torn_line(path: Path) -> None:
    """Remove the text after the last line end, which a dead writer left."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of metrics.jsonl up to `step`, for a run that resumes there."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            number = json.loads(line)["step"]
        except ValueError:
            break
        if number <= step and line.endswith(b"\n"):
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)


def last_step(path: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 without a line."""
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


class RunRecords:
    """The files of one run: metrics, events and, if wanted, TensorBoard."""

    def __init__(self, metrics: Path, events: Path, tensorboard: Path | None) -> None:
        self._metrics = JsonLines(metrics)
        self._events = JsonLines(events)
        self._tensorboard_folder = tensorboard
        self._writer: Any = None

    def step(self, metrics: StepMetrics, extra: dict[str, float]) -> None:
        """Record a committed step.

        Args:
            extra: further scalars for TensorBoard, by name.
        """
        line: dict[str, Any] = asdict(metrics)
        if metrics.offload is None:
            line.pop("offload")
        else:
            extra = extra | scalars(metrics.offload)
        self._metrics.append(line)
        self._scalars(
            metrics.step,
            {
                "loss_metrics/global_avg_loss": metrics.loss,
                "grad_norm": metrics.grad_norm,
                "lr": metrics.lr,
                "throughput(tps)": metrics.tokens_per_s,
                "time_metrics/end_to_end(s)": metrics.step_s,
                **extra,
            },
        )

    def event(self, event: str, **fields: Any) -> None:
        """Record an event with its fields and the time."""
        self._events.append({"time": time.time(), "event": event, **fields})

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._tensorboard_folder is None:
            return
        # Imported here: the import takes longer than the first steps of a small run.
        from tensorboard.compat.proto.event_pb2 import Event  # pyrefly: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self._tensorboard_folder))
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        summary = Summary(value=scalars)
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
