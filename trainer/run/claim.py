"""The claim of a run to the place of its checkpoints, where that is not the run's own folder.

A folder is locked while a run uses it. At a folder or URL the file owner.json says whose the
checkpoints are, and at a URL whether the run goes on. Local, in the process that opens the run.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from holdfast.checkpoint.format import OWNER, Manifest, scheme_of
from holdfast.checkpoint.stores import CheckpointStore, LocalStore, open_store, readable
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.files import machine_identity
from holdfast.parallel.reading import PathText, decode_json
from holdfast.trainer.config import RunConfig
from holdfast.trainer.run.folder_lock import is_locked, lock_folder
from holdfast.trainer.run.identity import IDENTITY, RunIdentity, read_identity
from holdfast.trainer.run.resume import (
    FINGERPRINT,
    WORTH_SAYING,
    checkpoint_root,
    differing_from_run,
    differing_keys,
)


class CheckpointOwner(msgspec.Struct, frozen=True):
    """The content of owner.json."""

    run: PathText
    """The `id` of the run's identity."""
    path: PathText
    """The run's folder."""
    host: PathText
    """The machine on which the run was started last."""
    in_use: bool = False
    """At a URL, which has no lock: whether the run has not ended yet, or could not say so."""
    machine: PathText = ""
    """The identity of that machine, which is new after it was started again; empty: not known."""


@contextlib.contextmanager
def claimed_checkpoints(
    root: Path, identity: RunIdentity, config: RunConfig, resume: str
) -> Iterator[tuple[str, ...]]:
    """Hold the places of a run's checkpoints during the block. Yields notes for a person.

    Args:
        resume: "auto", "best", "none" or a path; a checkpoint in a place is leave to take the
            place over.
    Raises:
        ConfigError: a place is another run's, in use, or cannot be written; or a URL cannot be
            reached by a run that begins. One that has checkpoints here goes on, and is told.
        CheckpointError: `latest` is there, and is no file.
    """
    own = CheckpointOwner(
        identity.id, str(root.absolute()), socket.gethostname(), machine=machine_identity()
    )
    notes: tuple[str, ...] = ()
    with contextlib.ExitStack() as held:
        folder = checkpoint_root(root, config)
        LocalStore(folder).latest()  # what is there instead of this file would fail every save
        if folder.resolve().parent != root.resolve():
            _refuse_other_runs_folder(folder, identity)
            held.enter_context(lock_folder(folder, "checkpoint.path", own.path))
            notes += _claim(LocalStore(folder), str(folder), own, config, resume)
        else:
            _require_rights(folder)
        if config.checkpoint.url:
            store = open_store(config.checkpoint.url)
            using = msgspec.structs.replace(own, in_use=True)
            try:
                notes += _claim(store, config.checkpoint.url, using, config, resume)
                held.callback(_release, store, own)
            except CheckpointError as error:
                if next(readable(LocalStore(folder)), None) is None:
                    raise ConfigError(
                        f"checkpoint.path = {config.checkpoint.url} cannot be used: {error}; check "
                        "the address, the credentials and the network, or name another place"
                    ) from error
                notes += (f"whose {config.checkpoint.url} is cannot be asked now: {error}",)
        yield notes


def _require_rights(folder: Path) -> None:
    """Check that a folder in the run's, if it is there, may be written.

    A disk that is full may have room later; rights do not come by themselves.

    Raises:
        ConfigError: it may not.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(
                f"{folder} cannot be written: {error.strerror}; make it writable for this user, or "
                "name another folder with checkpoint.path"
            ) from error


def _claim(
    store: CheckpointStore, place: str, own: CheckpointOwner, config: RunConfig, resume: str
) -> tuple[str, ...]:
    """Write this run's name into a place, if the place is its own or free."""
    owner = _owner_of(store)
    notes: tuple[str, ...] = ()
    if owner is None or owner.run != own.run:
        notes = _taken_over(store, place, owner, config, resume)
    # Drivers raise errors of many kinds; where it matters, saving tells them again.
    try:
        store.set_owner(msgspec.json.encode(own) + b"\n")
    except Exception as error:
        raise CheckpointError(f"{place} cannot be written: {error}") from error
    return notes


def _taken_over(
    store: CheckpointStore,
    place: str,
    owner: CheckpointOwner | None,
    config: RunConfig,
    resume: str,
) -> tuple[str, ...]:
    """Notes on taking a place over from another run, or from an unknown one.

    Raises:
        ConfigError: the other run uses it, or computes something else.
    """
    found = next(readable(store), None)
    named = _lies_in(resume, place)
    if owner is None:
        told = f"checkpoint.path = {place} holds checkpoints that name no run; they are this run's"
        return (f"{told} from now on",) if found else ()
    whose = f"checkpoint.path = {place} belongs to the run {owner.path} on {owner.host}"
    if _goes_on(owner) and not named:
        raise ConfigError(
            f"{whose}, which has not ended; wait for it or stop it, name another folder, or, if "
            f"it is dead, go on from one of its checkpoints with --resume {place}"
        )
    if found is None and resume != "none":
        return ()
    same = found is not None and not _differing(found[1], config)
    if named or (same and resume in ("auto", "best")):
        told = f"checkpoint.path = {place} belonged to the run {owner.path} on {owner.host}"
        return (f"{told}; this run has taken it over, with its checkpoints",)
    raise ConfigError(
        f"{whose}; name another folder, or go on from one of its checkpoints with --resume {place}"
    )


def _differing(manifest: Manifest, config: RunConfig) -> bool:
    """Whether a configuration computes something else than a checkpoint's."""
    saved, fingerprint = manifest.config, manifest.scalars.get(FINGERPRINT)
    now = msgspec.to_builtins(config)
    return bool(
        differing_keys(saved, now, WORTH_SAYING) or differing_from_run(saved, fingerprint, config)
    )


def _goes_on(owner: CheckpointOwner) -> bool:
    """Whether the run that a URL names may be going on.

    A run on a machine whose folders cannot be seen from here goes on until it says that it ended.
    """
    if not owner.in_use:
        return False
    root = Path(owner.path)
    try:
        identity = read_identity(root)
    except ConfigError:
        return True
    if identity is not None and identity.id == owner.run:
        return is_locked(root)
    if owner.machine:
        return owner.machine != machine_identity()
    return owner.host != socket.gethostname()


def _release(store: CheckpointStore, own: CheckpointOwner) -> None:
    """Say at a URL that the run has ended; what cannot be said now stays unsaid."""
    with contextlib.suppress(Exception):
        owner = _owner_of(store)
        if owner is not None and owner.run == own.run:
            store.set_owner(msgspec.json.encode(own) + b"\n")


def _owner_of(store: CheckpointStore) -> CheckpointOwner | None:
    content = store.owner()
    try:
        return decode_json(content, CheckpointOwner) if content else None
    except ValueError as error:
        raise ConfigError(
            f"{store.place_of(OWNER)} is damaged: {error}; remove it if the checkpoints are this "
            "run's"
        ) from error


def _refuse_other_runs_folder(folder: Path, identity: RunIdentity) -> None:
    """Raise ConfigError if a folder of checkpoints lies in another run's folder."""
    for root in (folder.resolve(), folder.resolve().parent):
        if (root / IDENTITY).exists():
            found = read_identity(root)
            if found is not None and found.id != identity.id:
                raise ConfigError(
                    f"checkpoint.path = {folder} lies in the folder of the run {root}; name a "
                    "folder of its own, or begin from a checkpoint there with --resume"
                )


def _lies_in(resume: str, place: str) -> bool:
    """Whether the checkpoint to resume from lies in a place, or is the place."""
    if resume in ("auto", "best", "none") or bool(scheme_of(resume)) != bool(scheme_of(place)):
        return False
    if scheme_of(place):
        return f"{resume.rstrip('/')}/".startswith(f"{place.rstrip('/')}/")
    return Path(resume).resolve().is_relative_to(Path(place).resolve())
