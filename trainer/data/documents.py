"""The files of a text corpus, their order, and the reading of documents."""

from __future__ import annotations

import logging
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.parallel.errors import DataError

logger = logging.getLogger(__name__)

LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
LIBRARY_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
LIBRARY_LIMIT_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """One file: one document.

    Attributes:
        path: where it lies.
        size_bytes, modified_ns: as found when it was listed.
        named: the user named the file itself, so it has to be text; files found in a named folder
            are left out when they are not.
    """

    path: Path
    size_bytes: int
    modified_ns: int
    named: bool


def list_documents(paths: Sequence[str], *, key: str = "data.path") -> tuple[DocumentFile, ...]:
    """The files of a corpus: named files as they come, folders recursively in sorted order.

    Hidden files and folders (whose name starts with a dot) within a folder are left out. Without
    paths the corpus is the Python standard library, see `library_documents`. `key` is the name of
    the paths in messages.

    Raises:
        DataError: a path does not exist, or is neither a file nor a folder.
    """
    if not paths:
        return library_documents()
    found: list[DocumentFile] = []
    for name in paths:
        path = Path(name).expanduser()
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise DataError(
                f'{key} "{name}": {error.strerror}; name a UTF-8 file or a folder of them'
            ) from error
        if stat.S_ISDIR(mode):
            found.extend(_folder(path))
        elif stat.S_ISREG(mode):
            found.append(_document(path, named=True))
        else:
            raise DataError(f'{key} "{name}": is neither a file nor a folder; name one')
    return tuple(found)


def library_documents() -> tuple[DocumentFile, ...]:
    """Source and documentation of the Python standard library: real text on every machine.

    `.py`, `.txt` and `.rst` files in sorted order, without installed packages and tests, up to
    the first 32 MiB.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen: list[DocumentFile] = []
    total_bytes = 0
    for document in _folder(root, excluded=LIBRARY_EXCLUDED):
        if document.path.suffix in LIBRARY_SUFFIXES:
            total_bytes += document.size_bytes
            if total_bytes > LIBRARY_LIMIT_BYTES:
                break
            chosen.append(document)
    return tuple(chosen)


def read_documents(files: Iterable[DocumentFile], *, key: str = "data.path") -> Iterator[bytes]:
    """The content of each file that is text and not empty, checked to be UTF-8.

    Files of a folder that are not text (not UTF-8, or with a zero byte) are left out; one warning
    at the end counts them.

    Raises:
        DataError: a named file is not UTF-8, or a file cannot be read.
    """
    left_out: list[Path] = []
    for file in files:
        try:
            content = file.path.read_bytes()
        except OSError as error:
            raise DataError(
                f'{key} "{file.path}": cannot be read ({error.strerror}); make it readable or '
                "name another"
            ) from error
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            if file.named:
                raise DataError(
                    f'{key} "{file.path}": not UTF-8 at byte {error.start} '
                    f"(0x{content[error.start]:02x}); convert the file (iconv -t UTF-8) or leave "
                    "it out"
                ) from error
            left_out.append(file.path)
            continue
        if not file.named and b"\0" in content:
            left_out.append(file.path)
        elif content:
            yield content
    if left_out:
        logger.warning(
            "%d files are not UTF-8 text and were left out of the corpus, the first is %s",
            len(left_out),
            left_out[0],
        )


def _folder(root: Path, excluded: frozenset[str] = frozenset()) -> list[DocumentFile]:
    paths: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in excluded and name[0] != "."]
        paths.extend(Path(folder, name) for name in names if name[0] != ".")
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    return [_document(path, named=False) for path in paths if path.is_file()]


def _document(path: Path, *, named: bool) -> DocumentFile:
    state = path.stat()
    return DocumentFile(path, state.st_size, state.st_mtime_ns, named)
