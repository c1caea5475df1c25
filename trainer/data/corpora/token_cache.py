"""The token cache on disk: made once per machine, shared by its ranks through memory mapping.

An entry is a folder `KEY/` with `tokens.npy` (uint16 or uint32, one dimension), `documents.npy`
(int64: where documents begin) and `entry.json` (counts, largest id, fingerprints). It is written in
a scratch folder and then renamed, so a visible entry is whole. A lock keeps ranks from doing the
same work twice; correctness does not depend on it (some network file systems have none).
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from holdfast.checkpoint.format import local_path
from holdfast.parallel.errors import DataError
from holdfast.parallel.files import await_lock, open_lock, scratch_folder
from holdfast.parallel.output import Waiting
from holdfast.parallel.reading import MALFORMED, Count, decode_json, open_regular, read_regular
from holdfast.trainer.data.corpora.stream import DocumentStarts

_PARTIAL = ".partial-"
"""The beginning of the names of folders in which entries are made."""
_LOCK_S = 3600.0
"""The longest time that a process makes an entry while others wait, in seconds."""
_DTYPES = (np.dtype("<u2"), np.dtype("<u4"))
_PLACES = np.dtype("<i8")
_ENTRY_BYTES = 4096
_ATTEMPTS = 3
"""Attempts to make an entry: without file locks, another process may take it for damaged."""


class CacheEntry(msgspec.Struct, frozen=True):
    """The description in `entry.json` of the tokens beside it."""

    count: Count
    largest: int
    fingerprint: str
    documents: Count
    documents_fingerprint: str


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """A `TokenStream` read through a memory map.

    Attributes:
        name: what messages call it.
        tokens: uint16 or uint32 [count].
        largest: the largest id; -1 when there is none.
    """

    name: str
    tokens: np.ndarray
    largest: int
    fingerprint: str
    documents: DocumentStarts

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1: int64[stop - start]."""
        return self.tokens[start:stop].astype(np.int64)


class TokenWriter:
    """Writes `tokens.npy` document by document; it keeps 8 bytes of each in memory."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self._file = file
        self._dtype = dtype
        self._hash = blake2b(digest_size=16)
        self._count = 0
        self._largest = -1
        self._starts = array("q")
        self._header_bytes = self._write_header()

    def append(self, tokens: np.ndarray) -> None:
        """Add a document: tokens of any integer dtype."""
        if len(tokens) == 0:
            return
        self._starts.append(self._count)
        self._largest = max(self._largest, int(tokens.max()))
        content = np.ascontiguousarray(tokens, dtype=self._dtype).tobytes()
        self._hash.update(content)
        self._file.write(content)
        self._count += len(tokens)

    def finish(self, documents: BinaryIO) -> CacheEntry:
        """Write the final header and sync the file; write `documents.npy`."""
        self._file.seek(0)
        # numpy pads headers so that a growing first dimension keeps their length
        if self._write_header() != self._header_bytes:
            raise RuntimeError("the header of a token file has grown over its tokens")
        self._file.flush()
        os.fsync(self._file.fileno())
        starts = np.array(self._starts, dtype=_PLACES)
        _write_header(documents, _PLACES, len(starts))
        documents.write(starts.tobytes())
        documents.flush()
        os.fsync(documents.fileno())
        named = blake2b(starts.tobytes(), digest_size=16).hexdigest()
        return CacheEntry(self._count, self._largest, self._hash.hexdigest(), len(starts), named)

    def _write_header(self) -> int:
        return _write_header(self._file, self._dtype, self._count)


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> int:
    """Write the header of an array of one dimension. Returns the place after it."""
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (count,),
    }
    np.lib.format.write_array_header_1_0(file, description)
    return file.tell()


def cache_folder() -> Path:
    """`$HOLDFAST_CACHE/tokens`, else `$XDG_CACHE_HOME/holdfast/tokens`, else under `~/.cache`.

    Without a home it is in the folder for temporary files.

    Raises:
        ConfigError: HOLDFAST_CACHE is a URL, or there is no folder that is safe to use.
    """
    own = os.environ.get("HOLDFAST_CACHE")
    if own:
        return local_path(own, "HOLDFAST_CACHE") / "tokens"
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "holdfast" / "tokens"
    try:
        return Path.home() / ".cache" / "holdfast" / "tokens"
    except RuntimeError:
        return _homeless_cache() / "tokens"


def _homeless_cache() -> Path:
    """The cache of a user without a home: a folder that no other user can write to.

    Raises:
        DataError: another user has made it, or it is open to others.
    """
    folder = Path(tempfile.gettempdir()) / f"holdfast-cache-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise DataError(
            f"no home is known for user {os.getuid()}, and {folder} is not a folder that this user "
            "alone can write to; set HOLDFAST_CACHE to one"
        )
    return folder


def cached_tokens(
    key: str, *, name: str, vocab: int, write: Callable[[TokenWriter], None]
) -> CachedTokens:
    """The tokens of an entry, made by `write` if it is missing or damaged.

    Args:
        key: the name of the entry; a digest of everything that the tokens depend on.
        name: the name of the stream in messages.
        vocab: ids are below it; it decides the dtype on disk.
        write: adds all tokens. Several processes may call it at once.

    Raises:
        DataError: the cache folder cannot be written. Errors of `write` pass, and leave nothing
            behind.
    """
    try:
        folder = cache_folder()
    except OSError as error:
        raise DataError(f"no token cache: {error}; set HOLDFAST_CACHE to a folder") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{key}.lock"):
            found = _open(folder / key, name)
            for _ in range(_ATTEMPTS):
                if found is not None:
                    break
                _make(folder, key, _DTYPES[vocab > 2**16], write)
                found = _open(folder / key, name)
    except OSError as error:
        raise DataError(
            f"token cache {folder}: cannot be written ({error.strerror}); set HOLDFAST_CACHE to a "
            "folder with room that you may write"
        ) from error
    if found is None:
        raise DataError(f"token cache {folder / key}: unreadable after writing; check the disk")
    return found


def found_tokens(key: str, *, name: str) -> CachedTokens | None:
    """The tokens of an entry; None if there is none, or no cache. Nothing is made."""
    try:
        return _open(cache_folder() / key, name)
    except OSError:
        return None


def _make(folder: Path, key: str, dtype: np.dtype, write: Callable[[TokenWriter], None]) -> None:
    with scratch_folder(folder, _PARTIAL) as scratch:
        made = scratch / key
        made.mkdir(0o700)
        with (made / "tokens.npy").open("wb") as file:
            writer = TokenWriter(file, dtype)
            write(writer)
            with (made / "documents.npy").open("wb") as documents:
                entry = writer.finish(documents)
        (made / "entry.json").write_bytes(msgspec.json.encode(entry))
        # a rank on another machine may have been first; its entry is as good
        if _open(folder / key, key) is not None:
            return
        # what stands there does not open: damaged, so it gives way
        with suppress(FileNotFoundError):
            (folder / key).rename(scratch / "damaged")
        with suppress(OSError):
            made.rename(folder / key)


def _open(path: Path, name: str) -> CachedTokens | None:
    """The entry; None if it is missing or damaged."""
    try:
        entry = decode_json(read_regular(path / "entry.json", _ENTRY_BYTES), CacheEntry)
        with open_regular(path / "tokens.npy") as file:
            tokens = _mapped(file, entry.count, _DTYPES)
        with open_regular(path / "documents.npy") as file:
            starts = _mapped(file, entry.documents, (_PLACES,))
    except (OSError, *MALFORMED):
        return None
    documents = DocumentStarts(starts, entry.documents_fingerprint)
    return CachedTokens(name, tokens, entry.largest, entry.fingerprint, documents)


def _mapped(file: BinaryIO, count: int, dtypes: Sequence[np.dtype]) -> np.ndarray:
    """The array in a file as `TokenWriter` writes it, of one of some types: [count], mapped.

    Raises:
        ValueError: it has another form, type, shape or length.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the form")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    size = file.tell() + count * dtype.itemsize
    if shape != (count,) or dtype not in dtypes or os.fstat(file.fileno()).st_size != size:
        raise ValueError("another type, shape or length")
    if count == 0:  # nothing to map
        return np.empty(0, dtype)
    return np.memmap(file, dtype, "r", file.tell(), shape)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The lock of an entry, as far as there is one; nothing depends on it.

    It is given up after a long time. Other users of a folder that several share have locks of their
    own, and a folder that cannot be written may have the entry already.
    """
    try:
        descriptor = open_lock(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield
        return
    try:
        await_lock(descriptor, Waiting(f"the process that makes {path.stem}", _LOCK_S).left_s)
        yield
    finally:
        os.close(descriptor)
