"""The choice and creation of a run's folder, in which nothing of a user's is overwritten. Local."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from holdfast.checkpoint.format import local_path
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.output import (
    content_of,
    is_event,
    json_lines,
    rising_steps,
    set_foreign_lines_aside,
    write_whole,
)
from holdfast.parallel.reading import is_own, read_regular
from holdfast.trainer.config import RunConfig, anchored, dump_toml, with_removals
from holdfast.trainer.run.folder_lock import LOCK, lock_folder, unwritable
from holdfast.trainer.run.history import (
    check_history,
    is_finished,
    is_unused,
    lost_of,
    passed_over,
    set_aside_history,
)
from holdfast.trainer.run.identity import IDENTITY
from holdfast.trainer.run.resume import find_resume
from holdfast.trainer.run.run_directory import RUNS, RunDirectory

_BESIDE = re.compile(
    r"\.lock|\.identity\.json-.*|checkpoints|logs|incidents|tensorboard|trace|events\.jsonl|"
    r"metrics\.jsonl|digests\.jsonl|rates\.json|superseded-.*"
)
"""Files that a person may copy into a new folder without the rest of a run."""


def choose_root(
    config_path: Path,
    out: Path | None,
    config: RunConfig,
    resume: str = "auto",
    *,
    allow_change: tuple[str, ...] = (),
) -> Path:
    """`out`; else the configuration's newest run in runs/ if it can go on; else a new folder.

    A run cannot be resumed if it is finished, if another process works on it, or if its
    configuration does not fit. A folder in which no run took a step is used again.
    """
    if out is not None:
        return local_path(out, "--out")
    numbers = [
        int(found[1])
        for path in RUNS.glob(f"{config_path.stem}-*")
        if (found := re.fullmatch(rf"{re.escape(config_path.stem)}-(\d+)", path.name))
    ]
    last = max(numbers, default=0)
    newest = RunDirectory(RUNS / f"{config_path.stem}-{last}")
    if last and not is_finished(newest):
        try:
            check_run_folder(newest.root)
            with lock_folder(newest.root, "--out"):
                if is_unused(newest):
                    return newest.root
                if resume in ("auto", "best"):
                    found = find_resume(newest.root, config, resume, allow_change=allow_change)
                    if found.candidates or lost_of(newest, config, found):
                        return newest.root
        except ConfigError:
            pass
    return RUNS / f"{config_path.stem}-{last + 1}"


def check_run_folder(root: Path) -> None:
    """Check that a folder is new, empty or a run's, before anything is written to it.

    Raises:
        ConfigError: it holds other files, is another user's, or is no folder.
    """
    try:
        names = sorted(path.name for path in root.iterdir())
        owner = root.stat().st_uid
    except FileNotFoundError:
        return
    except OSError as error:
        raise unwritable(root, error) from error
    if owner and not is_own(owner, root):  # root may be trusted, and makes the volumes of jobs
        raise ConfigError(
            f"{root} belongs to user {owner}; name another folder with --out, and begin from a "
            "checkpoint there with --resume"
        )
    foreign = [name for name in names if not _BESIDE.fullmatch(name)]
    if IDENTITY not in names and foreign and not _is_old_run(root):
        raise ConfigError(
            f"{root} is not the folder of a run: it holds {foreign[0]}; name a new folder with "
            "--out"
        )


def _remove_left(run: RunDirectory) -> None:
    """Remove what a run that was killed has left: the reasons for its end, and unfinished files."""
    left = [run.join_file, run.rewind_request, *(run.root / "logs").glob("rank-*.error.json")]
    for pattern in (
        "*.partial",
        f".{IDENTITY}-*",
        *(f"{folder}/*.partial" for folder in ("incidents", "trace", "logs")),
    ):
        left += run.root.glob(pattern)
    for path in left:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)


def _is_old_run(root: Path) -> bool:
    """Whether an earlier version, which wrote no identity, made a run in a folder."""
    try:
        locked = read_regular(root / LOCK).startswith(b"pid ")
    except (OSError, ValueError):
        locked = False
    with contextlib.suppress(OSError):
        _, record = next(json_lines(content_of(root / "metrics.jsonl")), (b"", None))
        locked = locked or bool((record or {}).get("loss_hex"))
    return locked and (root / "config.toml").is_file()


@contextlib.contextmanager
def locked_run(root: Path) -> Iterator[None]:
    """Make a run's folder and keep other processes from writing to it during the block.

    If the block fails before a run has begun in a new folder, the folder is removed.

    Raises:
        ConfigError: the folder is no run's, another process writes to it, or it cannot be written.
    """
    check_run_folder(root)
    made = [path for path in (root, *root.parents) if not path.exists()]
    with lock_folder(root, "--out"):
        try:
            yield
        except BaseException:
            if root in made and {path.name for path in root.iterdir()} <= {LOCK, IDENTITY}:
                with contextlib.suppress(OSError):
                    for name in (IDENTITY, LOCK):
                        (root / name).unlink(missing_ok=True)
                    for folder in made:
                        folder.rmdir()
            raise


def open_run(
    root: Path,
    config: RunConfig,
    resume: str = "auto",
    *,
    allow_change: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> RunDirectory:
    """Create the run's folder with its resolved configuration. One process calls it, with the lock.

    Args:
        resume: "auto", "best", "none" or the path of a checkpoint.
        allow_change: the keys that may differ from the checkpoint's though they must match.
        notes: what was noted before, for a person.
    Raises:
        ConfigError: the folder cannot be written, the checkpoint does not fit, or a part of the
            run's history is missing.
    """
    found = find_resume(root, config, resume, allow_change=allow_change)
    config, run = with_removals(config, found.removals), RunDirectory(root)
    if resume == "auto":
        check_history(run, config, found)
        notes += passed_over(root, config, found)
    try:
        (root / "logs").mkdir(parents=True, exist_ok=True)
        _remove_left(run)
        if resume == "none" or not found.candidates:
            notes += set_aside_history(run, config)
        notes += tuple(_tidied(run))
        note_config(run, config)
    except OSError as error:
        raise unwritable(root, error) from error
    return RunDirectory(root, replace(found, notes=(*notes, *found.notes)))


def note_config(run: RunDirectory, config: RunConfig) -> None:
    """Write the configuration of a run into its folder.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(run.config, dump_toml(anchored(config)).encode())


def _tidied(run: RunDirectory) -> Iterator[str]:
    """Set lines of the records aside that are torn or foreign, and yield notes about them."""
    for path, belongs in (
        (run.metrics, rising_steps()),
        (run.digests, rising_steps()),
        (run.events, is_event),
    ):
        if note := set_foreign_lines_aside(path, belongs):
            yield note
