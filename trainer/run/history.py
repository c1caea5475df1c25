"""The history in a run's folder: a start neither passes over a part of it nor loses it in silence.

Local, in the process that opens the run, with the folder locked. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from holdfast.checkpoint.format import step_of
from holdfast.checkpoint.stores import LocalStore, set_aside
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.output import content_of, is_event, json_lines
from holdfast.trainer.config import RunConfig, load_config
from holdfast.trainer.run.resume import (
    Resume,
    checkpoint_root,
    differing_from_run,
    set_aside_newer,
)
from holdfast.trainer.run.run_directory import RunDirectory

_LAST_EVENTS = 3
"""As many follow the end of a run at most."""
_START_OVER = "or start over with --resume none"


def lost_of(run: RunDirectory, config: RunConfig, found: Resume) -> str:
    """Why a run cannot begin with the checkpoints that were found; empty if it can.

    A checkpoint that lost its manifest can be whole, and checkpoints that a run has written can be
    elsewhere.
    """
    store = LocalStore(checkpoint_root(run.root, config))
    best = best_step(found)
    bare = [n for n in store.folders() if (step_of(n) or 0) > best and not store.has(n)]
    if bare:
        return (
            f"{store.place_of(bare[-1])} has no manifest.json, but may be a whole checkpoint: make "
            f"a new one with `holdfast verify --rebuild {store.place_of(bare[-1])}`, {_START_OVER}"
        )
    if found.candidates:
        return ""
    for name, reason in unreadable(store):
        return f"{store.place_of(name)} cannot be resumed from: {reason}; {_START_OVER}"
    committed = max((e["step"] for e in _commits(run.events)), default=0)
    if committed or (_has_content(run.metrics) and not run.events.exists()):
        told = f"a checkpoint of step {committed}" if committed else "steps in metrics.jsonl"
        return (
            f"{run.root} tells of {told}, and there is none in {store.root}: put it there, go on "
            f"from another with --resume PATH, {_START_OVER}"
        )
    return ""


def best_step(found: Resume) -> int:
    """The step of the newest checkpoint that was found; -1 if there is none."""
    steps = (step_of(place.rstrip("/").rpartition("/")[2]) for place in found.candidates)
    return max((step for step in steps if step is not None), default=-1)


def unreadable(store: LocalStore) -> Iterator[tuple[str, str]]:
    """The checkpoints with a manifest that cannot be read, newest first, each with the reason."""
    for name in reversed(store.names()):
        try:
            store.manifest(name)
        except CheckpointError as error:
            yield name, str(error)


def passed_over(root: Path, config: RunConfig, found: Resume) -> tuple[str, ...]:
    """Notes on the newer checkpoints whose manifest cannot be read."""
    store, best = LocalStore(checkpoint_root(root, config)), best_step(found)
    return tuple(
        f"{store.place_of(name)} is passed over: {reason}"
        for name, reason in unreadable(store)
        if (step_of(name) or 0) > best
    )


def check_history(run: RunDirectory, config: RunConfig, found: Resume) -> None:
    """Check that a run may begin in its folder with the checkpoints that were found.

    Raises:
        ConfigError: a checkpoint has lost its manifest or is gone, or the folder is another run's.
    """
    if not found.candidates and _has_content(run.metrics):
        _refuse_another(run, config)
    if lost := lost_of(run, config, found):
        raise ConfigError(lost)


def _refuse_another(run: RunDirectory, config: RunConfig) -> None:
    """Raise ConfigError if the run in a folder without checkpoints is another one."""
    try:
        before = msgspec.to_builtins(load_config(run.config, []))
        others = differing_from_run(before, None, config)
    except ConfigError:
        others = [("config.toml", None, None)]
    if others:
        raise ConfigError(
            f"{run.root} already holds another run (it differs in {others[0][0]}), which has no "
            "checkpoint; name another folder with --out, or start over with --resume none"
        )


def set_aside_history(run: RunDirectory, config: RunConfig) -> tuple[str, ...]:
    """Rename the records and checkpoints of a run that starts over. Returns notes on them."""
    run.journal.unlink(missing_ok=True)
    moved = [
        set_aside(path).name
        for path in (run.metrics, run.digests, run.events)
        if _has_content(path)
    ]
    folder = checkpoint_root(run.root, config)
    if LocalStore(folder).folders():
        # A folder that the run was given, or that was moved to another disk, keeps its place.
        inside = folder.parent == run.root and not folder.is_symlink()
        moved += [set_aside(folder).name] if inside else set_aside_newer(folder, -1)
    names = ", ".join(moved)
    return (f"the run starts over; what was here is kept as {names}",) if moved else ()


def is_unused(run: RunDirectory) -> bool:
    """Whether no run has taken a step in a folder, nor saved one."""
    return not _has_content(run.metrics) and not LocalStore(run.root / "checkpoints").folders()


def is_finished(run: RunDirectory) -> bool:
    """Whether the run in a folder reached its last step."""
    for event in reversed(read_events(run.events)[-_LAST_EVENTS:]):
        if event.get("event") in ("run_finished", "rewound"):
            return event["event"] == "run_finished"
    return False


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _commits(path: Path) -> Iterator[dict[str, Any]]:
    """The events of checkpoints that went to the disk or to a URL."""
    for event in read_events(path):
        kept = event.get("tier") in ("disk", "remote") and isinstance(event.get("step"), int)
        if event.get("event") == "checkpoint_committed" and kept:
            yield event


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run; empty without a file. Torn and foreign lines are left out."""
    try:
        lines = json_lines(content_of(path))
    except OSError:
        return []
    return [record for _, record in lines if record is not None and is_event(record)]
