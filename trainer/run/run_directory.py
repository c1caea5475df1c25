"""The folder of a run: the paths of its files, and the reason for a rank's end."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.parallel.errors import HoldfastError
from holdfast.parallel.output import write_whole
from holdfast.trainer.run.resume import Resume

RUNS = Path("runs")
"""The folder of the runs for which none is named."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths below a run's folder."""

    root: Path
    resume: Resume = field(default_factory=Resume)
    """The checkpoints that the run can resume from."""

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def trace(self) -> Path:
        return self.root / "trace"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def log(self, rank: int) -> Path:
        return self.root / "logs" / f"rank-{rank}.log"

    @property
    def chaos(self) -> Path:
        """The faults that the workers are asked to cause during the run."""
        return self.root / "chaos.jsonl"

    @property
    def journal(self) -> Path:
        """The membership changes of another run, which this one repeats."""
        return self.root / "replay.json"

    @property
    def join_file(self) -> Path:
        """How to join the run; it is there while the run is under way."""
        return self.root / "elastic.json"

    @property
    def incidents(self) -> Path:
        """The records of the changes that losses made necessary, one file each."""
        return self.root / "incidents"

    @property
    def agent_log(self) -> Path:
        """The log of the process that starts and watches the workers."""
        return self.root / "logs" / "agent.log"

    def error(self, rank: int) -> Path:
        """The reason for a rank's end, for the process that started it; see `write_error`."""
        return self.root / "logs" / f"rank-{rank}.error.json"


@dataclass(frozen=True, slots=True)
class RankError:
    """The reason for a rank's end."""

    rank: int
    kind: str
    message: str
    exit_code: int


def write_error(run: RunDirectory, rank: int, error: BaseException) -> RankError:
    """The reason for a rank's end, which is written beside its log where the disk allows it."""
    known = isinstance(error, HoldfastError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    exit_code = error.exit_code if isinstance(error, HoldfastError) else 1
    reason = RankError(rank, type(error).__name__, message, exit_code)
    text = {"kind": reason.kind, "message": message, "exit_code": exit_code}
    with contextlib.suppress(OSError):
        write_whole(run.error(rank), (json.dumps(text) + "\n").encode())
    return reason


def read_error(run: RunDirectory, rank: int) -> RankError | None:
    """The written reason for a rank's end; None if there is none."""
    try:
        found = json.loads(run.error(rank).read_text())
        kind, message = str(found["kind"]), str(found["message"])
        return RankError(rank, kind, message, int(found["exit_code"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
