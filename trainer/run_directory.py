"""The folder that a run leaves behind: who may write into it, and what it starts with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holdfast.parallel.errors import ConfigError, HoldfastError
from holdfast.trainer.config import RunConfig, dump_toml


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths below a run's folder."""

    root: Path

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

    def error(self, rank: int) -> Path:
        """What ended a rank, for whoever started it: see `write_error`."""
        return self.root / "logs" / f"rank-{rank}.error.json"


@dataclass(frozen=True, slots=True)
class RankError:
    """Why a rank ended."""

    rank: int
    kind: str
    message: str
    exit_code: int


def write_error(run: RunDirectory, rank: int, error: BaseException) -> RankError:
    """Leave the reason for a rank's end beside its log."""
    known = isinstance(error, HoldfastError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    exit_code = error.exit_code if isinstance(error, HoldfastError) else 1
    reason = RankError(rank, type(error).__name__, message, exit_code)
    text = {"kind": reason.kind, "message": message, "exit_code": exit_code}
    run.error(rank).write_text(json.dumps(text) + "\n")
    return reason


def read_error(run: RunDirectory, rank: int) -> RankError | None:
    """The reason that a rank left, if it did."""
    try:
        found = json.loads(run.error(rank).read_text())
    except (OSError, ValueError):
        return None
    return RankError(rank, found["kind"], found["message"], found["exit_code"])


def choose_root(config_path: Path, out: Path | None) -> Path:
    """`out`, or the first free runs/<config name>-<n>."""
    if out is not None:
        return out
    number = 1
    while (root := Path("runs") / f"{config_path.stem}-{number}").exists():
        number += 1
    return root


def open_run(
    root: Path, config: RunConfig, resume: Literal["auto", "none"] | str = "auto"
) -> RunDirectory:
    """Make the run's folder with the resolved configuration in it. Called by one process.

    Raises:
        ConfigError: it holds another run, cannot be written, or a checkpoint is asked for.
    """
    run = RunDirectory(root)
    if resume not in ("auto", "none"):
        raise ConfigError(
            f"--resume {resume}: checkpoints are not available in this version; use auto or none"
        )
    if run.metrics.exists() and run.metrics.stat().st_size and resume != "none":
        raise ConfigError(
            f"{root} already holds a run, and this version has no checkpoint to resume from; name "
            "another folder with --out, or start it over with --resume none"
        )
    try:
        (root / "logs").mkdir(parents=True, exist_ok=True)
        for stale in (run.metrics, run.events, *(root / "logs").glob("rank-*.error.json")):
            stale.unlink(missing_ok=True)
        partial = run.config.with_suffix(".partial")
        partial.write_text(dump_toml(config))
        partial.replace(run.config)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or root} cannot be written: {error.strerror}; name another folder with "
            "--out"
        ) from error
    return run
