"""The bytes of a checkpoint: tensor files, their headers, and the manifest. Pure; needs no torch.

docs/checkpoint-format.md is the specification; this module is the only code that knows the bytes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from holdfast import _native
from holdfast.parallel.errors import CheckpointError, Unreadable, shown
from holdfast.parallel.layout import Box, Layout, TensorSpec
from holdfast.parallel.precision import PRECISIONS
from holdfast.parallel.reading import MOST_COUNT, Count, decode_json, parse_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 8 + 100_000_000
"""The largest header of a tensor file, as safetensors has it."""
ALIGNMENT = 4096
"""The alignment of tensor data in bytes, so that direct I/O needs no shifting."""

_ELEMENT_TYPES: dict[str, tuple[int, str]] = {
    **{known.stored: (known.bytes, known.torch_name) for known in PRECISIONS.values()},
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
    "C64": (8, "complex64"),
}
ELEMENT_BYTES = {name: size for name, (size, _) in _ELEMENT_TYPES.items()}
"""The size in bytes of safetensors' element types, by name."""
TORCH_NAMES = {name: torch_name for name, (_, torch_name) in _ELEMENT_TYPES.items()}
"""torch's names of the same types, by safetensors' name."""


Checksum = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
Extents = Annotated[tuple[Count, ...], Meta(max_length=64)]
"""A shape, or a corner of a box: a number for each dimension."""
LATEST_TIME = 253_402_300_799.0
"""The end of the year 9999, in seconds since 1970."""


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """A logical tensor: [kind, dtype, shape]."""

    kind: str
    """The kind: a constant of kinds.py, a kind of optimizer state, or the caller's own."""
    dtype: str
    shape: Extents

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


class PieceEntry(msgspec.Struct, frozen=True, array_like=True):
    """A box of a tensor, contiguous in its file: [offset, length, start, stop, crc32c]."""

    offset: Count
    """The first byte, from the beginning of the file."""
    length: Count
    start: Extents
    stop: Extents
    crc32c: Checksum

    @property
    def box(self) -> Box:
        return Box(self.start, self.stop)


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the checkpoint."""

    bytes: Count
    header_bytes: Annotated[int, Meta(ge=0, le=MOST_HEADER_BYTES)] = 0
    """The bytes before the data of a tensor file; 0 for a file that is checked as a whole."""
    crc32c: Checksum
    """The checksum of the first `header_bytes` bytes of a tensor file, or of any other file's
    whole."""
    pieces: dict[str, tuple[PieceEntry, ...]] = msgspec.field(name="chunks", default_factory=dict)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a reader needs to know about a checkpoint."""

    format: str = "holdfast"
    format_version: int = FORMAT_VERSION
    id: str
    """The random name of this save, the same in every file's header."""
    step: Count
    created: Annotated[float, Meta(ge=0, le=LATEST_TIME)]
    """Seconds since 1970 (Unix time)."""
    versions: dict[str, str] = {}
    scalars: dict[str, Any] = {}
    config: dict[str, Any] = {}
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]

    @property
    def bytes(self) -> int:
        """The size of all files without the manifest."""
        return sum(entry.bytes for entry in self.files.values())

    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(name, t.shape, t.dtype) for name, t in self.tensors.items()]

    def layout(self, names: Iterable[str] | None = None) -> Layout:
        """The layout of the pieces; a holder is (file, position in the file's list for the tensor).

        Args:
            names: only these tensors; None: all.
        """
        wanted = None if names is None else set(names)
        holdings: dict[tuple[str, str, int], dict[str, tuple[Box, ...]]] = {}
        for file, entry in self.files.items():
            for name, pieces in entry.pieces.items():
                if wanted is None or name in wanted:
                    for place, piece in enumerate(pieces):
                        holdings[file, name, place] = {name: (piece.box,)}
        return Layout(holdings)


class _Version(msgspec.Struct):
    """The part of a manifest that is read first, whatever the rest looks like."""

    format_version: int


def crc32c_of(content: bytes | bytearray | memoryview, initial: int = 0) -> int:
    """The CRC-32C of bytes that follow data with the checksum `initial`."""
    view = memoryview(content).cast("B")
    if not view.nbytes:
        return initial
    if view.readonly:
        kept = bytes(view)
        address = ctypes.cast(ctypes.c_char_p(kept), ctypes.c_void_p).value
    else:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert address is not None
    return _native.crc32c(address, view.nbytes, initial)


COUNTS = ("step", "optimizer_step", "samples")
"""The keys of a manifest's scalars that count something, where a checkpoint has them."""
_CLOSING = b',"crc32c":"'


MANIFEST_END_BYTES = 32
"""The end of a manifest that tells whether it was written as a whole, or is none."""


def ends_manifest(end: bytes) -> bool:
    """Whether the last `MANIFEST_END_BYTES` bytes of a file can be those of a manifest."""
    _, closing, check = end.rpartition(_CLOSING)
    return bool(closing) and check.endswith(b'"}\n')


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: one JSON object, whose last key is a checksum of the rest."""
    body = msgspec.json.encode(manifest)[:-1]
    return body + _CLOSING + f'{crc32c_of(body):08x}"}}\n'.encode()


def decode_manifest(content: bytes, where: str) -> Manifest:
    """The manifest in `content`, which was read from `where`.

    Raises:
        CheckpointError: the content is not a manifest, has a newer version, or a byte of it
            changed.
    """
    body, _, check = content.rpartition(_CLOSING)
    if not ends_manifest(content[-MANIFEST_END_BYTES:]):
        raise CheckpointError(
            f"{where} is not a whole manifest: its last key must be crc32c; "
            "`holdfast verify --rebuild` makes a new one from the files' headers"
        )
    if f"{crc32c_of(body):08x}".encode() != check[:8]:
        raise CheckpointError(
            f"{where} is damaged: its content does not match its checksum; "
            "`holdfast verify --rebuild` makes a new one from the files' headers"
        )
    try:
        version = decode_json(body + b"}", _Version).format_version
        if version != FORMAT_VERSION:
            raise Unreadable(
                f"{where} has format version {version}; this version of holdfast reads "
                f"{FORMAT_VERSION}"
            )
        manifest = decode_json(body + b"}", Manifest)
        _check_names(manifest)
        _check_counts(manifest.scalars)
    except ValueError as error:
        raise CheckpointError(f"{where} is not a manifest: {error}") from error
    return manifest


def _check_names(manifest: Manifest) -> None:
    """Check that files have names of files of one folder, and tensors and boxes have known forms.

    Raises:
        ValueError: one has not; the message names it.
    """
    for name in manifest.files:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{shown(name)} is no name of a file in its folder")
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in ELEMENT_BYTES:
            raise ValueError(f"{shown(name)} has elements of unknown type {shown(tensor.dtype)}")
    for file, entry in manifest.files.items():
        for name, pieces in entry.pieces.items():
            dimensions = {len(p.start) for p in pieces} | {len(p.stop) for p in pieces}
            known = manifest.tensors.get(name)
            if known is not None and dimensions - {len(known.shape)}:
                raise ValueError(f"a piece of {shown(name)} in {shown(file)} has other dimensions")


def _check_counts(scalars: Mapping[str, Any]) -> None:
    """Check that what counts steps and samples are numbers.

    Raises:
        ValueError: one is none; the message names it.
    """
    for name in COUNTS:
        count = scalars.get(name, 0)
        if not isinstance(count, int | float) or not 0 <= count <= MOST_COUNT or count % 1:
            raise ValueError(f"{name} is {shown(count)}, and must be a number of 0 or more")


class FileTensor(msgspec.Struct, frozen=True):
    """A tensor of a tensor file, as safetensors lists it."""

    key: str
    name: str
    """The logical tensor that it is, or is a part of."""
    box: Box
    begin: int
    """The first byte, counted from the beginning of the data."""
    end: int


def key_of(name: str, box: Box, shape: Sequence[int]) -> str:
    """A box's name in a tensor file: the tensor's name, with the box unless that is the whole."""
    return name if box == Box.whole(shape) else f"{name}{box}".replace(", ", ",")


def header_capacity(
    tensors: Sequence[FileTensor],
    entries: Mapping[str, TensorEntry],
    pieces: Mapping[str, Sequence[PieceEntry]],
) -> int:
    """The bytes reserved before the data: room for any checksums, a multiple of ALIGNMENT."""
    most = {
        name: [PieceEntry(1 << 40, p.length, p.start, p.stop, 0xFFFFFFFF) for p in listed]
        for name, listed in pieces.items()
    }
    text = _header_text(tensors, entries, most, id="f" * 32, step=1 << 40)
    return -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT


def encode_header(
    tensors: Sequence[FileTensor],
    entries: Mapping[str, TensorEntry],
    pieces: Mapping[str, Sequence[PieceEntry]],
    *,
    id: str,
    step: int,
    capacity: int,
) -> bytes:
    """The first `capacity` bytes of a tensor file: a safetensors header padded with spaces."""
    text = _header_text(tensors, entries, pieces, id=id, step=step)
    if 8 + len(text) > capacity:
        raise ValueError(f"a header of {8 + len(text)} bytes does not fit into {capacity}")
    return (capacity - 8).to_bytes(8, "little") + text.ljust(capacity - 8)


def _header_text(
    tensors: Sequence[FileTensor],
    entries: Mapping[str, TensorEntry],
    pieces: Mapping[str, Sequence[PieceEntry]],
    *,
    id: str,
    step: int,
) -> bytes:
    ours = {
        "format_version": FORMAT_VERSION,
        "id": id,
        "step": step,
        "tensors": {tensor.name: entries[tensor.name] for tensor in tensors},
        "chunks": pieces,
    }
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "holdfast": msgspec.json.encode(ours).decode()}
    }
    for tensor in tensors:
        header[tensor.key] = {
            "dtype": entries[tensor.name].dtype,
            "shape": tensor.box.shape,
            "data_offsets": (tensor.begin, tensor.end),
        }
    return msgspec.json.encode(header)


class FileHeader(msgspec.Struct, frozen=True):
    """The description that a tensor file has of itself."""

    format_version: int
    id: str
    step: Count
    tensors: dict[str, TensorEntry]
    pieces: dict[str, tuple[PieceEntry, ...]] = msgspec.field(name="chunks")


def decode_header(content: bytes, where: str) -> FileHeader:
    """The part of a tensor file's header that this format adds; `content` is the whole header.

    Raises:
        CheckpointError: the content is not a safetensors header, or not one of this format.
    """
    try:
        header = parse_json(content[8:])
        return decode_json(header["__metadata__"]["holdfast"], FileHeader)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where} has no header of a holdfast checkpoint: {type(error).__name__} {error}"
        ) from error


def header_bytes(first: bytes, size: int, where: str) -> int:
    """The length of a tensor file's header, from the file's first 8 bytes and its size.

    Raises:
        CheckpointError: a file of `size` bytes cannot begin like this.
    """
    length = 8 + int.from_bytes(first[:8], "little")
    if len(first) < 8 or not 10 <= length <= min(size, MOST_HEADER_BYTES):
        raise CheckpointError(f"{where} is not a safetensors file, or its header is damaged")
    return length


def huggingface_index(manifest_files: Mapping[str, FileEntry], names: Iterable[str]) -> bytes:
    """model.safetensors.index.json, by which Hugging Face loaders find each weight."""
    weights = set(names)
    mapped: dict[str, str] = {}
    total = 0
    for file, entry in manifest_files.items():
        for name, pieces in entry.pieces.items():
            if name in weights:
                mapped[name] = file
                total += sum(piece.length for piece in pieces)
    text = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapped.items()))}
    return (json.dumps(text, indent=2) + "\n").encode()
