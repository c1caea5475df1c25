"""The identity of a run: a file in its folder that tells the run from every other.

A folder that was deleted and made anew, or copied, is another run. Local; needs no torch.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

import msgspec

from holdfast.parallel.errors import ConfigError

IDENTITY = "identity.json"


class RunIdentity(msgspec.Struct, frozen=True):
    """The content of identity.json; only the run's user can read it."""

    id: str
    """The run's name in owner files; not secret."""
    secret: str
    """The source of names that no other user can guess."""
    path: str
    """The absolute path of the folder at the last start."""


def read_identity(root: Path) -> RunIdentity | None:
    """The identity of the run in a folder; None if there is none.

    Raises:
        ConfigError: the file is damaged, or another user's.
    """
    path = root / IDENTITY
    try:
        content = read_own_file(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise ConfigError(
            f"{path} cannot be taken for this run's: {error.strerror}; a run belongs to the user "
            "who started it; name another folder with --out"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(content, type=RunIdentity)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path} is damaged: {error}; remove it, and the run gets a new identity"
        ) from error


def open_identity(root: Path) -> tuple[RunIdentity, tuple[str, ...]]:
    """The identity of the run in a folder, made at its first start, and notes for a person.

    A folder that has moved keeps its identity; a copy beside the living original gets one of its
    own. The process that opens the run calls it, with the folder locked.

    Raises:
        ConfigError: the file is damaged, another user's, or cannot be written.
    """
    path, found = str(root.absolute()), read_identity(root)
    if found is not None and found.path == path:
        return found, ()
    notes: tuple[str, ...] = ()
    if found is not None and _is_at(found, Path(found.path)):
        notes = (f"{root} is a copy of {found.path}, and a run of its own from now on",)
        found = None
    if found is None:
        found = RunIdentity(secrets.token_hex(16), secrets.token_hex(32), path)
    else:
        found = msgspec.structs.replace(found, path=path)
    try:
        write_own_file(root / IDENTITY, msgspec.json.encode(found) + b"\n")
    except OSError as error:
        raise ConfigError(f"{root / IDENTITY} cannot be written: {error.strerror}") from error
    return found, notes


def _is_at(identity: RunIdentity, root: Path) -> bool:
    """Whether the run with this identity lies in a folder, as far as this user can tell."""
    try:
        there = read_identity(root)
    except ConfigError:
        return False
    return there is not None and there.id == identity.id


def read_own_file(path: Path) -> bytes:
    """The content of a regular file of this user; a link is not followed.

    Raises:
        PermissionError: the file is not such a one.
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise PermissionError(error.errno, "it is a link", str(path)) from error
        raise
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise PermissionError(0, "it is no file", str(path))
        if not is_own(found.st_uid, path.parent):
            raise PermissionError(0, f"it belongs to user {found.st_uid}", str(path))
        return file.read()


def is_own(uid: int, folder: Path) -> bool:
    """Whether files of this user in a folder have this owner.

    Some network file systems give all files of a user to another one.
    """
    if uid == os.geteuid():
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as fresh:
            return uid == os.fstat(fresh.fileno()).st_uid
    except OSError:
        return False


def write_own_file(path: Path, content: bytes) -> None:
    """Replace a file that only this user can read, at one instant."""
    descriptor, fresh = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise
