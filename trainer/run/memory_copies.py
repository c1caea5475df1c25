"""The folder of a run's copies in shared memory: named by the run's secret, held while it runs.

Other users may make files beside it. So it is checked before anything in it is believed, and no
other user can know its name before it is there. Local; needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from holdfast.checkpoint.format import step_of
from holdfast.checkpoint.stores import LocalStore
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import try_lock, write_own_file
from holdfast.parallel.links import derived_key
from holdfast.parallel.reading import PathText, decode_json, read_regular
from holdfast.trainer.config import RunConfig
from holdfast.trainer.run.identity import IDENTITY, RunIdentity, read_identity

SHARED_MEMORY = Path("/dev/shm")
_OWNER = "owner.json"
_MOST_BYTES = 1 << 16
_NAME = re.compile(r"holdfast-\d+-[0-9a-f]{16}")


class _MemoryOwner(msgspec.Struct, frozen=True):
    """The run whose copies a folder holds."""

    id: PathText
    path: PathText
    """The run's folder."""
    device: int
    """The number of that folder's file system: without it, the run is not known to be gone."""


def memory_root(root: Path) -> Path | None:
    """The folder of a run's copies, which need not exist; None for a folder without a run.

    Raises:
        ConfigError: something else has its name.
    """
    identity = read_identity(root)
    if identity is None:
        return None
    place = _place(identity)
    _check_own(place)
    return place


def require_one_machine(config: RunConfig, ranks_here: int) -> None:
    """Check that all ranks are on this machine if their copies are to lie in its memory.

    Raises:
        ConfigError: they are not.
    """
    every, ranks = config.checkpoint.memory_every, config.parallel.ranks
    if every and ranks_here < ranks:
        raise ConfigError(
            f"checkpoint.memory_every = {every}: copies in shared memory are for runs on one "
            f"machine, and this one has {ranks_here} of {ranks} ranks; set it to 0"
        )


def forget_newer(root: Path, step: int) -> list[str]:
    """Remove a run's copies of steps after `step`, which the run repeats. Returns their names.

    Otherwise the end of the run would take them for its newest state.
    """
    place = memory_root(root)
    if place is None:
        return []
    newer = [n for n in LocalStore(place).folders() if (step_of(n) or 0) > step]
    for name in newer:
        shutil.rmtree(place / name)
    return newer


@contextlib.contextmanager
def held_memory(root: Path, identity: RunIdentity, *, make: bool) -> Iterator[None]:
    """Keep a run's copies in memory from other processes during the block.

    Args:
        make: whether the folder is made if it does not exist.
    Raises:
        ConfigError: something else has its name, another process uses it, or it cannot be made.
    """
    place = _place(identity)
    with contextlib.ExitStack() as held:
        try:
            while make or os.path.lexists(place):
                try:
                    _hold(place, root, identity, held, make=make)
                    break
                except FileNotFoundError:  # swept while it was empty
                    if not SHARED_MEMORY.is_dir():
                        raise
        except OSError as error:
            raise ConfigError(
                f"{place} cannot be written: {error.strerror}; set checkpoint.memory_every = 0"
            ) from error
        yield


def _hold(
    place: Path, root: Path, identity: RunIdentity, held: contextlib.ExitStack, *, make: bool
) -> None:
    """Lock the folder of a run's copies, and write into it whose it is."""
    if make and not os.path.lexists(place):
        place.mkdir(mode=0o700)
    _check_own(place)
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    held.callback(os.close, descriptor)
    if not try_lock(descriptor):
        raise ConfigError(
            f"the copies in memory of {root} ({place}) are in use by another process; wait for it, "
            "or stop it"
        )
    owner = _MemoryOwner(identity.id, str(root.absolute()), root.stat().st_dev)
    write_own_file(place / _OWNER, msgspec.json.encode(owner))


def sweep_memory() -> list[str]:
    """Remove this user's copies in memory of runs whose folders are gone. Returns their folders.

    Copies of a run that is there stay: it resumes from them.
    """
    gone = []
    for place in SHARED_MEMORY.glob(f"holdfast-{os.getuid()}-*"):
        with contextlib.suppress(OSError, ValueError):
            _check_own(place)
            if _NAME.fullmatch(place.name) and not any(place.iterdir()):
                place.rmdir()  # its process was killed as it made it, or makes it again
                continue
            owner = decode_json(read_regular(place / _OWNER, _MOST_BYTES, own=True), _MemoryOwner)
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _is_gone(owner) and try_lock(descriptor):
                    shutil.rmtree(place)
                    gone.append(owner.path)
            finally:
                os.close(descriptor)
    return gone


def _place(identity: RunIdentity) -> Path:
    key = derived_key(identity.secret, f"memory of {identity.id}")[:8]
    return SHARED_MEMORY / f"holdfast-{os.getuid()}-{key.hex()}"


def _check_own(place: Path) -> None:
    """Raise ConfigError if a folder in shared memory can be written by another user."""
    try:
        found = os.lstat(place)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        fault = "it is no folder"
    elif found.st_uid != os.geteuid():
        fault = f"it belongs to user {found.st_uid}"
    elif found.st_mode & 0o022:
        fault = f"others can write to it (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    raise ConfigError(
        f"{place} cannot be taken for this run's copies in memory: {fault}; have it removed"
    )


def _is_gone(owner: _MemoryOwner) -> bool:
    """Whether a run's folder does not exist any more, on a file system that is there."""
    root = Path(owner.path)
    if (root / IDENTITY).exists():
        found = read_identity(root)
        return found is not None and found.id != owner.id
    there = root
    while not there.exists():
        there = there.parent
    return there.stat().st_dev == owner.device
