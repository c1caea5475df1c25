"""Resuming: the checkpoints to resume from, and the check that the configuration fits them.

One process calls it, before the workers start. Needs no torch.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from holdfast.checkpoint.format import Manifest, expanded, scheme_of, step_of
from holdfast.checkpoint.stores import LocalStore, find_checkpoint, open_store, readable
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.trainer.config import DataConfig, NumericsConfig, RunConfig, flat_keys
from holdfast.trainer.run.initial_weights import (
    check_converted,
    check_tensors,
    has_state,
    is_converted,
)
from holdfast.trainer.run.memory_copies import memory_root
from holdfast.trainer.step import state_format

MUST_MATCH = (
    "model.",
    "data.",
    "train.seq_len",
    "train.global_batch",
    "train.micro_batch",
    "train.seed",
    "train.precision",
)
"""The keys that must not change, because the run would be another run."""
WORTH_SAYING = ("train.steps", "train.clip_grad_norm", "optimizer.", "numerics.")
"""The keys that may change and affect the computation."""


@dataclass(frozen=True, slots=True)
class Resume:
    """The checkpoints from which a run may resume, the best first; none to start at step 0."""

    candidates: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes for a person, one line each."""
    allow_change: bool = False
    """Whether a checkpoint of another model, other data or another batch is accepted."""


def checkpoint_root(root: Path, config: RunConfig) -> Path:
    """The folder of a run's checkpoints on the local disk."""
    path = config.checkpoint.path
    if not path or config.checkpoint.url:
        return root / "checkpoints"
    return expanded(path, "checkpoint.path")


def find_resume(root: Path, config: RunConfig, wanted: str, *, allow_change: bool) -> Resume:
    """Find the checkpoints from which a run resumes.

    Args:
        wanted: "auto" (the newest of this run's own, in memory, on disk or at its URL), "none", or
            a path or URL. A run can begin with converted weights; once it has checkpoints of its
            own, the same command resumes from these.
    Raises:
        ConfigError: the configuration differs from the checkpoint's in a key that must not change,
            or the path is not a checkpoint.
    """
    if wanted == "none":
        return Resume()
    if wanted != "auto":
        try:
            found = find_checkpoint(wanted)
            manifest = found.manifest()
        except CheckpointError as error:
            raise ConfigError(f"--resume {wanted}: {_convertible(wanted) or error}") from error
        if is_converted(manifest) and not has_state(manifest, state_format(config)):
            own = find_resume(root, config, "auto", allow_change=allow_change)
            if own.candidates:
                began = f"the run has checkpoints of its own; {found.place} is what it began with"
                return replace(own, notes=(began, *own.notes))
        notes = check_same_run(manifest, config, found.place, allow_change=allow_change)
        place = found.place if scheme_of(found.place) else str(Path(found.place).absolute())
        return Resume((place,), notes, allow_change)
    candidates: dict[int, tuple[str, Manifest]] = {}
    memory = memory_root(root)
    for folder in (checkpoint_root(root, config), *((memory,) if memory is not None else ())):
        store = LocalStore(folder.absolute())
        for name, manifest in readable(store):
            candidates.setdefault(manifest.step, (store.place_of(name), manifest))
    if not candidates and config.checkpoint.url:
        remote = open_store(config.checkpoint.url)
        candidates = {m.step: (remote.place_of(name), m) for name, m in readable(remote)}
    ordered = [candidates[step] for step in sorted(candidates, reverse=True)]
    if not ordered:
        return Resume()
    notes = check_same_run(ordered[0][1], config, ordered[0][0], allow_change=allow_change)
    return Resume(tuple(path for path, _ in ordered), notes, allow_change)


def _convertible(wanted: str) -> str:
    """What to do with a checkpoint of another format; empty if it is of none."""
    if scheme_of(wanted):
        return ""
    from holdfast.checkpoint.convert import recognise

    try:
        form = recognise(expanded(wanted, "--resume"))
    except OSError:
        form = None
    if form is None or form == "holdfast":
        return ""
    begin = shlex.quote(f"{Path(wanted).name}-start")
    return (
        f"it is a checkpoint of another format ({form}); convert it with `holdfast convert "
        f"{shlex.quote(wanted)} {begin} --to holdfast`, and give --resume {begin}"
    )


def check_same_run(
    manifest: Manifest, config: RunConfig, where: str, *, allow_change: bool
) -> tuple[str, ...]:
    """Compare a configuration with that of a checkpoint. Returns notes on harmless changes.

    Raises:
        ConfigError: keys that must not change differ and `allow_change` is false, or the
            checkpoint's weights are not those of the model.
    """
    if is_converted(manifest):
        return check_converted(manifest, config, where, allow_change=allow_change)
    saved, now = manifest.config, msgspec.to_builtins(config)
    differing = differing_keys(saved, now, MUST_MATCH)
    changed = [f"{key} = {mine!r} (the checkpoint has {its!r})" for key, its, mine in differing]
    if changed and not allow_change:
        raise ConfigError(
            f"{where} is of another run: {'; '.join(changed)}; change it back, start over with "
            "--resume none, or go on all the same with --allow-change"
        )
    if any(key.startswith("model.") for key, _, _ in differing):
        check_tensors(manifest, config, where)
    notes = [f"changed since the checkpoint: {line}" for line in changed]
    for key, its, mine in differing_keys(saved, now, WORTH_SAYING):
        notes.append(f"changed since the checkpoint: {key} = {mine!r} (was {its!r})")
    return tuple(notes)


def differing_keys(
    saved: dict[str, Any], now: dict[str, Any], prefixes: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """The keys of two configurations (nested dicts) that differ: (key, saved value, value now).

    A key that came after the saved configuration has its default there.
    """
    # In the form of a manifest: JSON has no tuples.
    plain = msgspec.json.decode(msgspec.json.encode((saved, now)))
    # An older version that lacks a key of these did what its default does.
    sections = {"data": DataConfig, "numerics": NumericsConfig}
    older = {name: msgspec.to_builtins(of()) for name, of in sections.items() if name in saved}
    flat_saved, flat_now = flat_keys(older) | flat_keys(plain[0]), flat_keys(plain[1])
    return [
        (key, flat_saved.get(key), flat_now.get(key))
        for key in sorted(flat_saved.keys() | flat_now.keys())
        if key.startswith(prefixes) and flat_saved.get(key) != flat_now.get(key)
    ]


def set_aside_newer(root: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step`: the run takes another course. Returns the new names."""
    store = LocalStore(root)
    return [store.set_aside(name) for name in store.folders() if (step_of(name) or 0) > step]
