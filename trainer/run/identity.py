"""The identity of a run: a file in its folder that tells the run from every other.

A folder that was deleted and made anew, or copied, is another run. Local; needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import write_own_file
from holdfast.parallel.links import MAKE_SECRET, new_secret
from holdfast.parallel.reading import PathText, decode_json, read_regular

IDENTITY = "identity.json"
_MOST_BYTES = 1 << 16


class RunIdentity(msgspec.Struct, frozen=True):
    """The content of identity.json; only the run's user can read it."""

    id: PathText
    """The run's name in owner files; not secret."""
    secret: Annotated[str, Meta(min_length=16, max_length=4096)]
    """What the processes of the run prove to each other that they know; names that no other user
    can guess come from it, too."""
    path: PathText
    """The absolute path of the folder at the last start."""


def read_identity(root: Path) -> RunIdentity | None:
    """The identity of the run in a folder; None if there is none.

    Raises:
        ConfigError: the file is damaged, or another user's.
    """
    path = root / IDENTITY
    try:
        content = read_regular(path, _MOST_BYTES, own=True)
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
        return decode_json(content, RunIdentity)
    except ValueError as error:
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
    if found is None:
        return first_identity(root), ()
    if found.path == path:
        return found, ()
    notes: tuple[str, ...] = ()
    changed = msgspec.structs.replace(found, path=path)
    if _is_copy(found, root):
        notes = (f"{root} is a copy of {found.path}, and a run of its own from now on",)
        changed = msgspec.structs.replace(changed, id=secrets.token_hex(16))
    with _explained(root):
        write_own_file(root / IDENTITY, _encoded(changed))
    return changed, notes


def first_identity(root: Path) -> RunIdentity:
    """The identity in a folder; where there is none, the first process that asks makes it.

    Raises:
        ConfigError: the file is damaged, another user's, or cannot be written.
    """
    made = RunIdentity(secrets.token_hex(16), new_secret(), str(root.absolute()))
    with _explained(root):
        if not os.path.lexists(root / IDENTITY):
            root.mkdir(parents=True, exist_ok=True)
            try:
                write_own_file(root / IDENTITY, _encoded(made), first=True)
            except FileExistsError:
                pass
            except OSError:  # a disk without hard links
                write_own_file(root / IDENTITY, _encoded(made))
    return read_identity(root) or made


def require_private(root: Path) -> None:
    """Check that other users cannot read the identity in a folder.

    Raises:
        ConfigError: they can, or there is none.
    """
    path = root / IDENTITY
    try:
        mode = stat.S_IMODE(os.lstat(path).st_mode)
    except OSError as error:
        raise ConfigError(f"{path}, which has the run's secret: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(
            f"others may read the run's secret in {path} (mode {mode:o}); remove it, so that a new "
            f"one is made, or, if this disk knows no modes, give one: {MAKE_SECRET}"
        )


def _encoded(identity: RunIdentity) -> bytes:
    return msgspec.json.encode(identity) + b"\n"


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{root / IDENTITY} cannot be written: {error.strerror}") from error


def _is_copy(identity: RunIdentity, root: Path) -> bool:
    """Whether the run with this identity lies in another folder, as far as this user can tell."""
    original = Path(identity.path)
    try:
        there = read_identity(original)
        return there is not None and there.id == identity.id and not original.samefile(root)
    except (ConfigError, OSError):
        return False
