"""Reading of what another program or person may have written: regular files, and JSON. Local.

A name that should be a file may lead to a folder, a pipe, a device or a link in a circle, and a
file may have any content. Everything here ends with a value or with one error that says why not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, TypeVar

import msgspec
from msgspec import Meta

from holdfast.parallel.errors import ConfigError

_T = TypeVar("_T")
MOST_COUNT: Final = 1 << 62
Count = Annotated[int, Meta(ge=0, le=MOST_COUNT)]
"""A number of bytes, elements, ranks or steps, or a position, as a file or message may tell it."""
Text = Annotated[str, Meta(max_length=1 << 16)]
PathText = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
"""A path or a name in a file or message."""
MALFORMED: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""The errors of taking apart what has another structure than is expected."""
MOST_NAME_BYTES = 255
"""The longest name of a file, in bytes."""
MOST_BYTES = 1 << 30
"""The largest file that is read whole where no smaller limit is known, in bytes."""
_BEYOND_BYTES = 1 << 16
_begun: set[Any] = set()
"""The types whose fields have been looked up; see `_begin`."""
_beginning = threading.Lock()
os.register_at_fork(
    before=_beginning.acquire,
    after_in_parent=_beginning.release,
    after_in_child=_beginning.release,
)


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading, without waiting for the writer of a pipe.

    Args:
        follow: whether `path` may be a link.
    Raises:
        OSError: it is no regular file, or cannot be opened; `strerror` says why.
    """
    return os.fdopen(open_descriptor(path, os.O_RDONLY, follow=follow), "rb")


def open_descriptor(
    path: Path, flags: int, mode: int = 0o666, *, follow: bool = True, own: bool = False
) -> int:
    """Open, or with O_CREAT make, a regular file. Returns its descriptor.

    Args:
        flags, mode: as for `os.open`.
        follow: whether `path` may be a link.
        own: whether the file has to be this user's.
    Raises:
        PermissionError: with `own`, it is no regular file, or not this user's.
        OSError: it is no regular file, or cannot be opened; `strerror` says why.
    """
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    wrong = errno.EPERM if own else errno.EINVAL
    try:
        descriptor = os.open(path, flags, mode)
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    except OSError as error:
        if error.errno == errno.ELOOP and not follow and path.is_symlink():
            raise OSError(wrong, "it is a link", str(path)) from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        is_folder = stat.S_ISDIR(found.st_mode)
        fault = f"it is {'a folder' if is_folder else 'a pipe, a socket or a device'}, not a file"
    elif own and not is_own(found.st_uid, path.parent):
        fault = f"it belongs to user {found.st_uid}"
    else:
        return descriptor
    os.close(descriptor)
    raise OSError(wrong, fault, str(path))


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


def read_regular(
    path: Path, most_bytes: int = MOST_BYTES, *, follow: bool = True, own: bool = False
) -> bytes:
    """The content of a regular file of at most `most_bytes`.

    Args:
        follow: whether `path` may be a link.
        own: whether the file has to be this user's, and `path` no link.
    Raises:
        PermissionError: with `own`, it is not such a one.
        OSError: as for `open_regular`; or the file is larger.
    """
    descriptor = open_descriptor(path, os.O_RDONLY, follow=follow and not own, own=own)
    with os.fdopen(descriptor, "rb") as file:
        return read_whole(file, path, most_bytes)


def read_whole(file: BinaryIO, path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of an open file of at most `most_bytes`, from where it stands.

    Args:
        path: where it lies, for the error.
    Raises:
        OSError: it is larger; nothing was read.
    """
    size = os.fstat(file.fileno()).st_size
    if size > most_bytes:
        told = f"it has {size:,} bytes, and such a file has at most {most_bytes:,}"
        raise OSError(errno.EFBIG, told, str(path))
    # Files of the kernel have content beyond their size; a read takes memory for all it asks for.
    return file.read(min(most_bytes, size + _BEYOND_BYTES))


def is_text(name: str) -> bool:
    """Whether a name from outside can be written down and sent: each of its bytes is a part of a
    character."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def require_text_names(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Check that the names that a command is given, and those of its folders, are text.

    Raises:
        ConfigError: one is not; it says which.
    """
    names = [(f"argument {number}", text) for number, text in enumerate(arguments, 1)]
    names.append(("TMPDIR", environment.get("TMPDIR", "")))
    with contextlib.suppress(OSError):  # it is gone
        names.append(("the working folder", os.getcwd()))
    for name, text in names:
        if not is_text(text):
            raise ConfigError(
                f"{name}, {text}: is not text in {sys.getfilesystemencoding()}; use a name that is"
            )


def read_name(path: Path) -> str:
    """The name that a small text file has, such as one of the newest save.

    Raises:
        OSError: as for `read_regular`; or it is longer than the name of a file can be.
    """
    return read_regular(path, MOST_NAME_BYTES).decode(errors="replace").strip()


def parse_json(content: bytes | str) -> Any:
    """The value that JSON text of any origin stands for. NaN and infinities are allowed.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has text that cannot be encoded.
    """
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    mark = b"\\ud" if isinstance(content, bytes) else "\\ud"
    if mark in content.lower():  # pyrefly: ignore
        json.dumps(found, ensure_ascii=False).encode()
    return found


def decode_json(content: bytes | str, kind: type[_T]) -> _T:
    """The value of one type that JSON text stands for.

    Raises:
        ValueError: it is no JSON, or not of that type; the message says where.
    """
    _begin(kind)
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ValueError(str(error)) from error


def of_kind(plain: Any, kind: type[_T]) -> _T:
    """The value of one type that JSON values stand for. Dataclasses and structs are built.

    Raises:
        ValueError: they are not of that type; the message says where.
    """
    try:
        return converted(plain, kind)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def converted(plain: Any, kind: type[_T]) -> _T:
    """The value of one type that plain values stand for. From any thread.

    Raises:
        msgspec.ValidationError: they are not of that type; the message says where.
        RecursionError: they are nested too deeply.
    """
    _begin(kind)
    return msgspec.convert(plain, kind)


def _begin(kind: type[Any]) -> None:
    """Have the fields of a type looked up by one thread.

    msgspec notes what it has found so far on the type itself, where another thread that begins
    meanwhile finds fields missing: a segmentation fault (seen with 0.22).
    """
    if kind not in _begun:
        with _beginning:
            msgspec.json.Decoder(kind)
            _begun.add(kind)
