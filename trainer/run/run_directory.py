"""The folder of a run: its files, its lock, and its creation."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from holdfast.parallel.errors import ConfigError, HoldfastError
from holdfast.trainer.config import RunConfig, dump_toml, load_config
from holdfast.trainer.run.resume import (
    MUST_MATCH,
    Resume,
    checkpoint_root,
    differing_keys,
    find_resume,
    is_finished,
    set_aside_all,
)


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
    """Write the reason for a rank's end beside its log."""
    known = isinstance(error, HoldfastError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    exit_code = error.exit_code if isinstance(error, HoldfastError) else 1
    reason = RankError(rank, type(error).__name__, message, exit_code)
    text = {"kind": reason.kind, "message": message, "exit_code": exit_code}
    run.error(rank).write_text(json.dumps(text) + "\n")
    return reason


def read_error(run: RunDirectory, rank: int) -> RankError | None:
    """The written reason for a rank's end; None if there is none."""
    try:
        found = json.loads(run.error(rank).read_text())
    except (OSError, ValueError):
        return None
    return RankError(rank, found["kind"], found["message"], found["exit_code"])


def choose_root(
    config_path: Path,
    out: Path | None,
    config: RunConfig,
    resume: str = "auto",
    *,
    allow_change: bool = False,
) -> Path:
    """`out`; else the configuration's newest run in runs/ if it can go on; else a new folder.

    A run cannot be resumed if it is finished, if another process works on it, or if its
    configuration does not fit.
    """
    if out is not None:
        return out
    numbers = [
        int(found[1])
        for path in Path("runs").glob(f"{config_path.stem}-*")
        if (found := re.fullmatch(rf"{re.escape(config_path.stem)}-(\d+)", path.name))
    ]
    last = max(numbers, default=0)
    newest = Path("runs") / f"{config_path.stem}-{last}"
    if last and resume == "auto" and not is_finished(newest):
        try:
            with lock_run(newest):
                found = find_resume(newest, config, "auto", allow_change=allow_change)
            if found.candidates:
                return newest
        except ConfigError:
            pass
    return Path("runs") / f"{config_path.stem}-{last + 1}"


@contextlib.contextmanager
def lock_run(root: Path) -> Iterator[None]:
    """Keep other processes from writing to a run's folder during the block.

    Raises:
        ConfigError: another process writes to the folder, or it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / ".lock").open("a+")
    except OSError as error:
        raise _unwritable(root, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ConfigError(
                f"{root} is in use by another run ({file.read().strip() or 'unknown process'}); "
                "wait for it, stop it, or name another folder with --out"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def open_run(
    root: Path, config: RunConfig, resume: str = "auto", *, allow_change: bool = False
) -> RunDirectory:
    """Create the run's folder with its resolved configuration. One process calls it, with the lock.

    Args:
        resume: "auto", "none" or the path of a checkpoint.
        allow_change: whether a checkpoint with another model, data or batch is accepted.
    Raises:
        ConfigError: the folder cannot be written, or the checkpoint does not fit.
    """
    found = find_resume(root, config, resume, allow_change=allow_change)
    run = RunDirectory(root, found)
    if resume == "auto" and not found.candidates:
        _check_own(run, config)
    try:
        (root / "logs").mkdir(parents=True, exist_ok=True)
        stale = list((root / "logs").glob("rank-*.error.json"))
        if not found.candidates:
            stale += [run.metrics, run.events, run.journal]
            set_aside_all(checkpoint_root(root, config))
        for path in stale:
            path.unlink(missing_ok=True)
        partial = run.config.with_suffix(".partial")
        partial.write_text(dump_toml(config))
        partial.replace(run.config)
    except OSError as error:
        raise _unwritable(root, error) from error
    return run


def _check_own(run: RunDirectory, config: RunConfig) -> None:
    """Refuse to overwrite another run that had no checkpoint to resume from."""
    if not run.metrics.exists() or not run.metrics.stat().st_size:
        return
    try:
        before = msgspec.to_builtins(load_config(run.config, []))
        others = differing_keys(before, msgspec.to_builtins(config), MUST_MATCH)
    except ConfigError:
        others = [("config.toml", None, None)]
    if others:
        raise ConfigError(
            f"{run.root} already holds another run (it differs in {others[0][0]}), which has no "
            "checkpoint; name another folder with --out, or start over with --resume none"
        )


def _unwritable(root: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{error.filename or root} cannot be written: {error.strerror}; name another folder with "
        "--out"
    )
