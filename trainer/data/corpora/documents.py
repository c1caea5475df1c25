"""The files of a text corpus, and their order."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from holdfast.checkpoint.format import expanded
from holdfast.parallel.errors import DataError
from holdfast.trainer.data.corpora.json_lines import ARRAY_SUFFIX, SUFFIXES

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
        only_json: the named folder in which it was found has nothing but JSON.
    """

    path: Path
    size_bytes: int
    modified_ns: int
    named: bool
    only_json: bool = False


def list_documents(paths: Sequence[str], *, key: str = "data.path") -> tuple[DocumentFile, ...]:
    """The files of a corpus: named files as they come, folders recursively in sorted order.

    Hidden files and folders (whose name starts with a dot) within a folder are left out. Without
    paths the corpus is the Python standard library, see `library_documents`. `key` is the name of
    the paths in messages.

    Raises:
        DataError: a path does not exist, is neither a file nor a folder, or is a folder of which a
            part cannot be read.
        ConfigError: a path begins with a ~ for which no home is known.
    """
    if not paths:
        return library_documents()
    found: list[DocumentFile] = []
    for name in paths:
        path = expanded(name, key)
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise DataError(
                f'{key} "{name}": {error.strerror}; name a UTF-8 file or a folder of them'
            ) from error
        if stat.S_ISDIR(mode):
            found.extend(_whole_folder(path, key))
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


def _whole_folder(root: Path, key: str) -> list[DocumentFile]:
    """The files of a folder that the user named.

    Raises:
        DataError: a part of it cannot be read, or lies elsewhere: nothing is left out unsaid.
    """

    def refuse(path: Path, fault: str) -> NoReturn:
        raise DataError(f'{key} "{root}": {path} {fault}')

    def unreadable(error: OSError) -> NoReturn:
        refuse(Path(error.filename), f"cannot be read ({error.strerror}); make it readable")

    for folder, inner, names in os.walk(root, onerror=unreadable):
        inner[:] = [name for name in inner if name[0] != "."]
        for path in (Path(folder, name) for name in inner):
            if path.is_symlink():
                refuse(path, "is a link to a folder; name that folder as well, and remove the link")
        for path in (Path(folder, name) for name in names if name[0] != "."):
            if not path.exists():
                refuse(path, "is a link that leads nowhere; remove it")
    return _folder(root)


def _folder(root: Path, excluded: frozenset[str] = frozenset()) -> list[DocumentFile]:
    paths: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in excluded and name[0] != "."]
        paths.extend(Path(folder, name) for name in names if name[0] != ".")
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    files = [path for path in paths if path.is_file()]
    only_json = all(path.suffix.lower() in (ARRAY_SUFFIX, *SUFFIXES) for path in files)
    return [_document(path, named=False, only_json=only_json) for path in files]


def _document(path: Path, *, named: bool, only_json: bool = False) -> DocumentFile:
    state = path.stat()
    return DocumentFile(path, state.st_size, state.st_mtime_ns, named, only_json)
