"""Files of torch.save, read by byte range: the offsets of tensors, and the plain values."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from holdfast.checkpoint.convert.elements import SourceTensor, ZipRecord, stored
from holdfast.checkpoint.convert.sources.pickles import (
    PickledObject,
    StoredTensor,
    count_values,
    read_pickle,
)
from holdfast.checkpoint.format import ELEMENT_BYTES
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import open_regular

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ORDER_BYTES = 16
_MOST_SMALL_BYTES = 1 << 12
"""The most bytes of the word for the order of bytes."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The content of a file of torch.save, with tensors as `StoredTensor`s."""

    content: Any
    file: str
    """The file's path, relative to the source's folder."""
    offsets: Mapping[str, int]
    """The first byte of each storage in the file."""
    sizes: Mapping[str, int]
    """The bytes of each storage."""
    records: Mapping[str, ZipRecord] = field(default_factory=dict)
    """The zip records of storages that have a checksum."""

    def source(
        self,
        key: str,
        tensor: StoredTensor,
        *,
        shard: tuple[tuple[str, int], ...] = (),
        full_shape: tuple[int, ...] | None = None,
    ) -> SourceTensor:
        """A tensor of the file as a source tensor.

        Raises:
            CheckpointError: the tensor lies outside of its storage.
        """
        size = ELEMENT_BYTES[tensor.dtype]
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        end = (tensor.start + last + 1) * size if all(tensor.shape) else 0
        if end > self.sizes.get(tensor.storage, 0) or min(tensor.strides, default=0) < 0:
            raise CheckpointError(
                f"{self.file} is damaged: {key} needs {end} bytes of a storage of "
                f"{self.sizes.get(tensor.storage, 0)}"
            )
        offset = self.offsets.get(tensor.storage, 0) + tensor.start * size
        found = stored(
            key,
            tensor.dtype,
            tensor.shape,
            self.file,
            offset,
            strides=tensor.strides,
            shard=shard,
            full_shape=full_shape,
        )
        record = self.records.get(tensor.storage)
        whole = prod(tensor.shape) * size == self.sizes.get(tensor.storage)
        if record is None or not whole or tensor.start:
            return found
        return replace(found, records={(self.file, offset, prod(tensor.shape) * size): record})

    def read(self, root: Path, tensor: StoredTensor) -> bytes:
        """The bytes of a small contiguous tensor.

        Raises:
            CheckpointError: it is larger than a small one can be.
        """
        size = ELEMENT_BYTES[tensor.dtype]
        count = prod(tensor.shape)
        if count * size > _MOST_SMALL_BYTES:
            raise CheckpointError(
                f"{root / self.file}: a tensor of {count:,} elements is where a count should be"
            )
        with open_regular(root / self.file) as file:
            file.seek(self.offsets[tensor.storage] + tensor.start * size)
            return file.read(count * size)


def read_torch_file(root: Path, file: str) -> TorchFile:
    """Read the description that a file of torch.save has of itself; no tensor is read.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, older than torch 1.6, or its
            pickle is refused.
    """
    path = root / file
    try:
        with open_regular(path) as opened:
            size = os.fstat(opened.fileno()).st_size
            return read_torch_item(opened, 0, size, file, str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def read_torch_item(opened: BinaryIO, offset: int, length: int, file: str, where: str) -> TorchFile:
    """The content that torch.save wrote at byte `offset` of an open file."""
    try:
        with zipfile.ZipFile(_Window(opened, offset, length)) as archive:  # pyrefly: ignore
            return _read_archive(archive, opened, offset, length, file, where)
    except zipfile.BadZipFile as error:
        opened.seek(offset)
        old = opened.read(2) == b"\x80\x02"
        what = (
            "was written by torch before 1.6; open and save it with a newer one"
            if old
            else f"is truncated or damaged ({error})"
        )
        raise CheckpointError(f"{where} {what}") from error


def _read_archive(
    archive: zipfile.ZipFile, opened: BinaryIO, offset: int, length: int, file: str, where: str
) -> TorchFile:
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    records: dict[str, ZipRecord] = {}
    pickled: zipfile.ZipInfo | None = None
    for entry in archive.infolist():
        _, _, name = entry.filename.partition("/")
        if name == "data.pkl":
            pickled = entry
        elif name == "byteorder" and _content(archive, entry, _ORDER_BYTES) != b"little":
            raise CheckpointError(f"{where} was written by a big-endian machine")
        elif name.startswith("data/"):
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{where} is compressed, which torch.save never does")
            opened.seek(offset + entry.header_offset)
            signature, named, extra = _LOCAL_HEADER.unpack(opened.read(_LOCAL_HEADER.size))
            start = entry.header_offset + _LOCAL_HEADER.size + named + extra
            if signature != b"PK\x03\x04" or start + entry.file_size > length:
                raise CheckpointError(f"{where} is damaged: {name} lies outside of the file")
            offsets[name.removeprefix("data/")] = offset + start
            sizes[name.removeprefix("data/")] = entry.file_size
            if entry.CRC:
                records[name.removeprefix("data/")] = ZipRecord(entry.filename, entry.CRC)
    if pickled is None:
        raise CheckpointError(f"{where} is not a file of torch.save: it has no data.pkl")
    content = read_pickle(_content(archive, pickled, length), where)
    return TorchFile(content, file, offsets, sizes, records)


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most_bytes: int) -> bytes:
    if entry.compress_type != zipfile.ZIP_STORED:
        # A few bytes could stand for any number.
        raise zipfile.BadZipFile(f"{entry.filename} is compressed, which torch.save never does")
    if max(entry.file_size, entry.compress_size) > most_bytes:
        raise zipfile.BadZipFile(f"{entry.filename} has {entry.file_size:,} bytes")
    if not entry.CRC:
        # torch.serialization.set_crc32_options(False) leaves out the checksum.
        del entry.CRC
    return archive.read(entry)


def tensors_in(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All tensors of nested dicts and lists, with their paths.

    Raises:
        CheckpointError: there are too many values.
    """
    yield from _tensors_in(value, (), count_values())


def _tensors_in(
    value: Any, prefix: tuple[str, ...], visit: Callable[[], None]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    visit()
    if isinstance(value, StoredTensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(item, (*prefix, str(key)), visit)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _tensors_in(item, (*prefix, str(number)), visit)
    elif isinstance(value, PickledObject):
        for key, item in value.__dict__.items():
            yield from _tensors_in(item, (*prefix, key), visit)


class _Window(io.RawIOBase):
    """A range of an open file as a file of its own."""

    def __init__(self, opened: BinaryIO, offset: int, length: int) -> None:
        self._opened, self._offset, self._length = opened, offset, length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        self._opened.seek(self._offset + self._position)
        content = self._opened.read(size)
        self._position += len(content)
        return content
