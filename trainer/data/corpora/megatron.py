"""Tokenised corpora of Megatron: `.bin`/`.idx` pairs, read by megatron-core's IndexedDataset.

`PREFIX.idx` holds a header of 34 bytes (magic, version, dtype code, number of sequences, number of
document boundaries), then the length (int32), byte offset (int64) of every sequence and the
document boundaries (int64); `PREFIX.bin` holds the tokens. Megatron's tools and this project write
documents in order, so the `.bin` file is their concatenation. A window is then one read at a known
offset; nothing has to be built or searched, whatever the size.
"""

from __future__ import annotations

import os
import struct
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from holdfast.checkpoint.format import expanded
from holdfast.parallel.errors import DataError
from holdfast.parallel.reading import open_regular
from holdfast.trainer.data.corpora.stream import DocumentStarts

if TYPE_CHECKING:
    from types import ModuleType

    from megatron.core.datasets.indexed_dataset import IndexedDataset

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""By the code of an integer dtype in an index: the bytes of a token."""
SAMPLED_BYTES = 2**16
CHECKED_AT_ONCE = 2**20


@dataclass(frozen=True, slots=True)
class MegatronStream:
    """A `TokenStream` over one `.bin`/`.idx` pair.

    Attributes:
        name: what messages call it.
        count: number of tokens.
        fingerprint: of the sizes and of the first and last bytes of both files (reading whole
            corpora would take minutes).
        dtype: of the tokens.
        index_path: the `.idx` file.
        file: the `.bin` file. It is not mapped: a mapped file that is cut off, or whose disk fails,
            kills its reader without a word.
    """

    name: str
    count: int
    fingerprint: str
    dtype: np.dtype
    index_path: Path
    file: BinaryIO

    @property
    def documents(self) -> DocumentStarts:
        """The places where documents begin, read from the index: 8 bytes each.

        Raises:
            DataError: the boundaries of documents are not in order, or not of sequences.
        """
        with open_regular(self.index_path) as file:
            _, _, _, sequences, boundaries = HEADER.unpack(file.read(HEADER.size))
            file.seek(4 * sequences, os.SEEK_CUR)
            pointers, first = (
                np.fromfile(file, dtype="<i8", count=count) for count in (sequences, boundaries)
            )
        steps = np.diff(first)
        whole = len(pointers) == sequences and len(first) == boundaries
        if not whole or first[0] != 0 or first[-1] != sequences or (steps < 0).any():
            raise DataError(
                f"{self.name}: the documents of its index do not follow one another from sequence "
                f"0 to sequence {sequences}; prepare the data again"
            )
        return DocumentStarts(pointers[first[:-1][steps > 0]], "", self.dtype.itemsize)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the concatenated documents: int64[stop - start].

        Raises:
            DataError: the file has been cut off since it was opened.
            OSError: it cannot be read.
        """
        tokens = np.empty(stop - start, self.dtype)
        at = start * self.dtype.itemsize
        left = memoryview(cast("Any", tokens.view(np.uint8)))
        while left:
            done = os.preadv(self.file.fileno(), [left], at)
            if done == 0:
                raise DataError(
                    f"{self.name}: the .bin file has been cut off at byte {at} while it is read; "
                    "prepare the data again, and leave its files alone while a run reads them"
                )
            left, at = left[done:], at + done
        return tokens.astype(np.int64)


def indexed_dataset_module() -> ModuleType:
    """megatron-core's `indexed_dataset` module. Takes seconds the first time: it imports the rest.

    Raises:
        DataError: megatron-core is not installed.
    """
    try:
        with warnings.catch_warnings():
            # On import, megatron-core lists missing optional accelerators, which do not matter
            # here.
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    except ImportError as error:
        raise DataError(
            "Megatron's .bin/.idx files need megatron-core, which cannot be imported "
            f"({error}); run: pip install 'holdfast[megatron]'"
        ) from error
    return indexed_dataset


def megatron_stream(prefix: str) -> MegatronStream:
    """Open the pair `PREFIX.bin`, `PREFIX.idx`; the name of either file also serves as the prefix.

    Raises:
        DataError: the pair is missing, damaged, not in Megatron's format, not of integers or not in
            order, or megatron-core is not installed.
    """
    name, index_path, token_path = _pair(prefix)
    _check_index(index_path, name)
    size_bytes = token_path.stat().st_size
    if size_bytes == 0:
        raise DataError(f"{name}: {token_path} is empty; prepare it again")
    dataset = indexed_dataset_module().IndexedDataset(str(token_path.with_suffix("")))
    dtype = np.dtype(dataset.index.dtype)
    _check_order(dataset, size_bytes, dtype.itemsize, name)
    digest = blake2b(f"megatron 1 {HEADER.size} {size_bytes}".encode(), digest_size=16)
    for path in (index_path, token_path):
        digest.update(_ends(path))
    count, file = size_bytes // dtype.itemsize, open_regular(token_path)
    return MegatronStream(name, count, digest.hexdigest(), dtype, index_path, file)


def _pair(prefix: str) -> tuple[str, Path, Path]:
    """The name of a pair in messages, its index and its file of tokens.

    Raises:
        DataError: one of them is missing.
    """
    base = str(expanded(prefix, "data.path")).removesuffix(".bin").removesuffix(".idx")
    name = f'data.path "{prefix}"'
    index_path, token_path = Path(base + ".idx"), Path(base + ".bin")
    for path in (index_path, token_path):
        if not path.is_file():
            raise DataError(
                f"{name}: {path} does not exist; name the prefix that .bin and .idx share"
            )
    return name, index_path, token_path


def token_count(prefix: str) -> int:
    """The number of tokens of a pair, from its sizes; megatron-core is not imported.

    Raises:
        DataError: the pair is missing, or its index is damaged.
    """
    name, index_path, token_path = _pair(prefix)
    return token_path.stat().st_size // _ITEM_BYTES[_check_index(index_path, name)]


def _check_index(path: Path, name: str) -> int:
    """Check the header and the length, which megatron-core asserts or trusts.

    Returns the code of the dtype.
    """
    with open_regular(path) as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{name}: {path} is not a Megatron index; prepare the data again")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{name}: {path} has version {version}, known is 1; prepare it again")
    if code not in _ITEM_BYTES:
        raise DataError(f"{name}: {path} has dtype code {code}, token ids are integers")
    needed = HEADER.size + 12 * sequences + 8 * boundaries
    if sequences == 0 or boundaries == 0 or path.stat().st_size < needed:
        raise DataError(
            f"{name}: {path} has {path.stat().st_size} bytes, its {sequences} sequences need "
            f"{needed}; it is empty or cut off, prepare the data again"
        )
    return code


def _check_order(dataset: IndexedDataset, size_bytes: int, itemsize: int, name: str) -> None:
    """Raise DataError unless the sequences follow one another and fill the `.bin` file."""
    lengths, pointers = dataset.index.sequence_lengths, dataset.index.sequence_pointers
    expected = 0
    for start in range(0, len(lengths), CHECKED_AT_ONCE):
        sizes = lengths[start : start + CHECKED_AT_ONCE].astype(np.int64) * itemsize
        ends = expected + np.cumsum(sizes)
        if not np.array_equal(pointers[start : start + CHECKED_AT_ONCE], ends - sizes):
            raise DataError(
                f"{name}: sequences do not lie one after another in the .bin file; merge or "
                "prepare the data again"
            )
        expected = int(ends[-1])
    if expected != size_bytes:
        raise DataError(
            f"{name}: the index counts {expected} bytes of tokens, the .bin file has {size_bytes}; "
            "the two do not belong together or one is cut off, prepare the data again"
        )


def _ends(path: Path) -> bytes:
    with open_regular(path) as file:
        first = file.read(SAMPLED_BYTES)
        file.seek(max(0, path.stat().st_size - SAMPLED_BYTES))
        return first + file.read(SAMPLED_BYTES)
