"""Files in the form of torch.save, laid out first, so that tensors are written in place.

A file is a zip archive without compression: a pickle of everything but the tensors' bytes, and a
record for each storage at a multiple of 64 bytes. The bytes of tensors are written later. Local.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from holdfast.checkpoint.convert.elements import row_major
from holdfast.checkpoint.convert.writing.pickle_writing import Call, Named, Persistent, write_pickle
from holdfast.checkpoint.format import ELEMENT_BYTES

STORAGE_ALIGNMENT = 64
_STORAGE_TYPES = {
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "F64": "DoubleStorage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
    "C64": "ComplexFloatStorage",
}
TORCH_FILE_DTYPES = tuple(_STORAGE_TYPES)
"""The types of tensors that this form has."""
_LIMIT = 0xFFFFFFFF
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_FOLDER = "archive"


@dataclass(frozen=True, slots=True)
class TensorToCome:
    """A placeholder in a file's content for a tensor whose bytes are written later."""

    number: int
    """The number of its storage: 0, 1, … in the order of the file."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


def _with_storages(value: Any) -> Any:
    """The content, with tensors in the form of torch.save."""
    if isinstance(value, TensorToCome):
        kind = Named("torch", _STORAGE_TYPES[value.dtype])
        storage = ("storage", kind, str(value.number), "cpu", prod(value.shape))
        hooks = Call(Named("collections", "OrderedDict"))
        arguments = (Persistent(storage), 0, value.shape, row_major(value.shape), False, hooks)
        return Call(Named("torch._utils", "_rebuild_tensor_v2"), arguments)
    if isinstance(value, Mapping):
        return {key: _with_storages(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_storages(item) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class _ZipEntry:
    name: str
    offset: int
    """The offset of its local header."""
    start: int
    """The offset of its bytes."""
    size: int
    content: bytes | None
    """None for the bytes of a tensor."""


@dataclass(frozen=True, slots=True)
class TorchLayout:
    """The layout of a torch.save file before its tensors' bytes are known."""

    records: tuple[_ZipEntry, ...]
    starts: tuple[int, ...]
    """The first byte of each tensor, in the order of their numbers."""
    bytes: int

    def parts(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Everything but the tensors, as (byte in the file, content).

        Args:
            checksums: the CRC-32 (zip's) of each tensor's bytes.
        """
        central, number = b"", 0
        for record in self.records:
            if record.content is None:
                crc = checksums[number]
                number += 1
            else:
                crc = zlib.crc32(record.content)
            yield record.offset, _local_header(record, crc) + (record.content or b"")
            central += _central_header(record, crc)
        last = self.records[-1]
        start = last.start + last.size
        yield start, central + _end(len(self.records), len(central), start)


def lay_out(content: Any, tensors: Sequence[TensorToCome]) -> TorchLayout:
    """Lay out a file of torch.save.

    Args:
        content: the content, with `TensorToCome` for tensors, of kinds that torch.load's
            weights-only mode accepts.
        tensors: the tensors of the content, in the order of their numbers.
    """
    pickled = write_pickle(_with_storages(content))
    contents: list[tuple[str, bytes | None, int]] = [
        ("data.pkl", pickled, 0),
        (".format_version", b"1", 0),
        (".storage_alignment", str(STORAGE_ALIGNMENT).encode(), 0),
        ("byteorder", b"little", 0),
    ]
    contents += [(f"data/{tensor.number}", None, tensor.bytes) for tensor in tensors]
    contents += [("version", b"3\n", 0)]
    records, position = [], 0
    for name, content_bytes, size in contents:
        full = f"{_FOLDER}/{name}"
        size = size if content_bytes is None else len(content_bytes)
        header = _LOCAL.size + len(full) + _zip64_bytes(size)
        # The padding is an extra field of its own, which takes 4 bytes at least.
        start = position + header + 4
        start = -(-start // STORAGE_ALIGNMENT) * STORAGE_ALIGNMENT
        records.append(_ZipEntry(full, position, start, size, content_bytes))
        position = start + size
    starts = tuple(record.start for record in records if record.content is None)
    central = sum(len(_central_header(record, 0)) for record in records)
    total = position + central + len(_end(len(records), central, position))
    return TorchLayout(tuple(records), starts, total)


def torch_file(content: Any) -> bytes:
    """A whole torch.save file without tensors.

    Args:
        content: values of kinds that torch.load's weights-only mode accepts.
    """
    layout = lay_out(content, [])
    whole = bytearray(layout.bytes)
    for at, part in layout.parts([]):
        whole[at : at + len(part)] = part
    return bytes(whole)


def _zip64_bytes(size: int) -> int:
    return 20 if size >= _LIMIT else 0


def _local_header(record: _ZipEntry, crc: int) -> bytes:
    name, size = record.name.encode(), record.size
    large = size >= _LIMIT
    shown = _LIMIT if large else size
    extra = struct.pack("<2H2Q", 1, 16, size, size) if large else b""
    padding = record.start - record.offset - _LOCAL.size - len(name) - len(extra)
    extra += struct.pack("<2s1H", b"FB", padding - 4) + b"Z" * (padding - 4)
    fields = (45 if large else 20, 0, 0, 0, 0x21, crc, shown, shown, len(name), len(extra))
    return _LOCAL.pack(b"PK\x03\x04", *fields) + name + extra


def _central_header(record: _ZipEntry, crc: int) -> bytes:
    name = record.name.encode()
    wide = [value for value in (record.size, record.size, record.offset) if value >= _LIMIT]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, offset = min(record.size, _LIMIT), min(record.offset, _LIMIT)
    version = 45 if wide else 20
    fields = (version, version, 0, 0, 0, 0x21, crc, size, size, len(name), len(extra), 0, 0, 0)
    return _CENTRAL.pack(b"PK\x01\x02", *fields, 0, offset) + name + extra


def _end(count: int, size: int, start: int) -> bytes:
    wide = b""
    if count >= 0xFFFF or size >= _LIMIT or start >= _LIMIT:
        wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        wide += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + size, 1)
    few = min(count, 0xFFFF)
    return wide + struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, few, few, min(size, _LIMIT), min(start, _LIMIT), 0
    )
