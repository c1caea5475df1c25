"""The folder of a run: the paths of its files, and the reason for a rank's end."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.parallel.errors import (
    ConfigError,
    HoldfastError,
    in_a_line,
    process_refusal,
)
from holdfast.parallel.output import write_whole
from holdfast.parallel.reading import PathText, decode_json, read_regular
from holdfast.trainer.run.resume import Resume

RUNS = Path("runs")
"""The folder of the runs for which none is named."""
_MOST_BYTES = 1 << 20


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
    def digests(self) -> Path:
        """The digests of each step's loss, gradients and parameters, chained by hash."""
        return self.root / "digests.jsonl"

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
    def rewind_request(self) -> Path:
        """The steps that a person asks the workers to take back."""
        return self.root / "rewind.json"

    @property
    def journal(self) -> Path:
        """The membership changes of another run, which this one repeats."""
        return self.root / "replay.json"

    @property
    def join_file(self) -> Path:
        """How to join the run; it is there while the run is under way."""
        return self.root / "elastic.json"

    @property
    def terms(self) -> Path:
        """What the ranks of an elastic run train with; newcomers are held to it."""
        return self.root / "terms.json"

    @property
    def health(self) -> Path:
        """What was found on the nodes that began an elastic run; newcomers are held to it."""
        return self.root / "health.json"

    @property
    def incidents(self) -> Path:
        """The records of the changes that losses made necessary, one file each."""
        return self.root / "incidents"

    @property
    def console_log(self) -> Path:
        """What the run has said on the console."""
        return self.root / "logs" / "console.log"

    @property
    def agent_log(self) -> Path:
        """The log of the process that starts and watches the workers."""
        return self.root / "logs" / "agent.log"

    def error(self, rank: int) -> Path:
        """The reason for a rank's end, for the process that started it; see `write_error`."""
        return self.root / "logs" / f"rank-{rank}.error.json"


class RunAnswer(msgspec.Struct, frozen=True):
    """What the process that opens a run tells the others."""

    error: str = ""
    """The reason why the run does not begin."""
    root: PathText | None = None
    """The run's folder."""
    resume: Resume = Resume()
    lighthouse: str = ""
    """The URL of the Lighthouse of an elastic run."""


def told_run(content: bytes) -> tuple[RunDirectory, str]:
    """The run in an encoded `RunAnswer`, and the URL of its Lighthouse.

    Raises:
        ConfigError: the run does not begin, or the content is of another version of holdfast.
    """
    try:
        answer = decode_json(content, RunAnswer)
        if answer.root is None and not answer.error:
            raise ValueError("it names no folder")
    except ValueError as error:
        raise ConfigError(
            f"the first process has told of its run in an unknown way ({error}); run the same "
            "version of holdfast everywhere"
        ) from error
    if answer.root is None:
        raise ConfigError(answer.error)
    return RunDirectory(Path(answer.root), answer.resume), answer.lighthouse


@dataclass(frozen=True, slots=True)
class RankError:
    """The reason for a rank's end."""

    rank: int
    kind: str
    message: str
    exit_code: int


class _WrittenError(msgspec.Struct, frozen=True):
    kind: str
    message: str
    exit_code: Annotated[int, Meta(ge=0, le=255)]


def write_error(run: RunDirectory, rank: int, error: BaseException) -> RankError:
    """The reason for a rank's end, which is written beside its log where the disk allows it."""
    known = isinstance(error, HoldfastError)
    message = process_refusal(error) or (str(error) if known else in_a_line(error))
    exit_code = error.exit_code if isinstance(error, HoldfastError) else 1
    reason = RankError(rank, type(error).__name__, message, exit_code)
    text = _WrittenError(reason.kind, message, exit_code)
    with contextlib.suppress(OSError):
        write_whole(run.error(rank), msgspec.json.encode(text) + b"\n")
    return reason


def read_error(run: RunDirectory, rank: int) -> RankError | None:
    """The written reason for a rank's end; None if there is none."""
    try:
        found = decode_json(read_regular(run.error(rank), _MOST_BYTES), _WrittenError)
    except (OSError, ValueError):
        return None
    return RankError(rank, found.kind, found.message, found.exit_code)
