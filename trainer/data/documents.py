"""The files of a text corpus, their order, and the reading of documents."""

from __future__ import annotations

import logging
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from holdfast.checkpoint.format import expanded
from holdfast.parallel.errors import DataError
from holdfast.parallel.reading import open_regular
from holdfast.trainer.data.json_lines import (
    SUFFIXES,
    is_json_lines,
    json_documents,
    looks_like_json_lines,
)

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


@dataclass(frozen=True, slots=True)
class DocumentForm:
    """The way in which files are cut into documents.

    Attributes:
        json_key: the key of the text in a line of JSON Lines.
        all_json: whether every file is JSON Lines, whatever its suffix.
    """

    json_key: str = "text"
    all_json: bool = False

    def is_json(self, file: DocumentFile) -> bool:
        """Whether a file is read as JSON Lines; else it is one document."""
        return self.all_json or is_json_lines(file.path)


def read_documents(
    files: Iterable[DocumentFile],
    *,
    key: str = "data.path",
    form: DocumentForm = DocumentForm(),
) -> Iterator[bytes]:
    """The documents of all files, not empty, checked to be UTF-8.

    A file is one document; a file of JSON Lines has one per line. Files of a folder that are not
    text (not UTF-8, or with a zero byte) are left out; one warning at the end counts them.

    Raises:
        DataError: a named file is not UTF-8, a file cannot be read, a line of JSON Lines has no
            text, or a file of another suffix is JSON Lines.
    """
    left_out: list[Path] = []
    for file in files:
        try:
            if form.is_json(file):
                with open_regular(file.path) as lines:
                    yield from json_documents(lines, str(file.path), form.json_key)
                continue
            with open_regular(file.path) as opened:  # one that grows is read as it was found
                content = opened.read(os.fstat(opened.fileno()).st_size)
        except OSError as error:
            raise DataError(
                f'{key} "{file.path}": cannot be read ({error.strerror}); make it readable or '
                "name another"
            ) from error
        if not _is_text(file, content, key):
            left_out.append(file.path)
        elif looks_like_json_lines(content):
            raise DataError(
                f'{key} "{file.path}": every line of it is a JSON object, so it is JSON Lines; '
                f"give it one of the suffixes {', '.join(SUFFIXES)}, and its texts are read by "
                "data.json_key (--json-key)"
            )
        elif content:
            yield content
    if left_out:
        logger.warning(
            "%d files are not UTF-8 text and were left out of the corpus, the first is %s",
            len(left_out),
            left_out[0],
        )


def _is_text(file: DocumentFile, content: bytes, key: str) -> bool:
    """Whether a file is text; one that the user named has to be UTF-8."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        if file.named:
            raise DataError(
                f'{key} "{file.path}": not UTF-8 at byte {error.start} '
                f"(0x{content[error.start]:02x}); convert the file (iconv -t UTF-8) or leave it out"
            ) from error
        return False
    return file.named or b"\0" not in content


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
    return [_document(path, named=False) for path in paths if path.is_file()]


def _document(path: Path, *, named: bool) -> DocumentFile:
    state = path.stat()
    return DocumentFile(path, state.st_size, state.st_mtime_ns, named)
