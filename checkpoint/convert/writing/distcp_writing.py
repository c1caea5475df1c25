"""Folders of torch.distributed.checkpoint (`.distcp`, `.metadata`), laid out in advance."""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import (
    LogicalTensor,
    Unit,
    combine_crc32,
    row_boxes,
    units_of,
)
from holdfast.checkpoint.convert.sources import DCP_METADATA
from holdfast.checkpoint.convert.writing.pickle_writing import (
    Call,
    Instance,
    Named,
    Pairs,
    size,
    write_pickle,
)
from holdfast.checkpoint.convert.writing.torch_writing import (
    STORAGE_ALIGNMENT,
    TORCH_FILE_DTYPES,
    TensorToCome,
    TorchLayout,
    lay_out,
)
from holdfast.checkpoint.format import ELEMENT_BYTES, TORCH_NAMES
from holdfast.checkpoint.stores import open_written, write_synced
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

ITEM_BYTES = 64 << 20
"""The largest item, unless one row is larger: a reader takes an item whole."""
LARGEST_FILE_BYTES = 4 << 30

Key = tuple[Any, ...]
"""A path in the state that a reader asks for."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A box of a tensor, or an object, and its place in a file."""

    path: Key
    layout: TorchLayout
    file: str
    offset: int
    box: Box | None = None
    units: range = range(0)
    content: bytes = b""
    """The content of a tensor that is made here."""


class DistcpFolder:
    """Collects the content of a folder; the bytes of tensors are written later, in place."""

    def __init__(self, folder: str = "") -> None:
        """Start an empty folder.

        Args:
            folder: the folder inside the output; "" for the output itself.
        """
        self._folder = Path(folder)
        self._items: list[_Item] = []
        self._types: dict[Key, tuple[str, tuple[int, ...]]] = {}
        self._name, self._position = "__0_0.distcp", 0
        self._full: dict[str, int] = {}
        self.units: list[Unit] = []

    @property
    def files(self) -> dict[str, int]:
        """The size of each file in bytes, by name in the output."""
        sizes = {**self._full, self._name: self._position}
        return {self._path(name): size for name, size in sizes.items()}

    def add(self, path: Key, tensor: LogicalTensor, dtype: str) -> None:
        """Add a tensor, of type `dtype` in the output.

        Raises:
            CheckpointError: files of torch.save have no such type.
        """
        if dtype not in TORCH_FILE_DTYPES:
            raise CheckpointError(
                f"{tensor.full_name} has dtype {dtype}, which cannot be written so"
            )
        self._types[path] = dtype, tensor.shape
        for box in row_boxes(Box.whole(tensor.shape), ELEMENT_BYTES[dtype], ITEM_BYTES):
            come = TensorToCome(0, dtype, box.shape)
            layout = lay_out(come, [come])
            self._make_room(layout.bytes)
            first, start = len(self.units), self._position + layout.starts[0]
            at = self._path(self._name)
            self.units += units_of(tensor, box, dtype, at, start)
            self._append(path, layout, box, range(first, len(self.units)))

    def add_number(self, path: Key, value: float) -> None:
        """Add a tensor float32[] with a known value."""
        come = TensorToCome(0, "F32", ())
        layout = lay_out(come, [come])
        self._make_room(layout.bytes)
        self._types[path] = "F32", ()
        content = struct.pack("<f", value)
        self._append(path, layout, Box((), ()), range(0), content)

    def add_object(self, path: Key, value: Any) -> None:
        """Add an object that torch.load's weights-only mode accepts."""
        layout = lay_out(value, [])
        self._make_room(layout.bytes)
        self._append(path, layout)

    def _append(
        self,
        path: Key,
        layout: TorchLayout,
        box: Box | None = None,
        units: range = range(0),
        content: bytes = b"",
    ) -> None:
        item = _Item(path, layout, self._name, self._position, box, units, content)
        self._items.append(item)
        self._position += layout.bytes

    def _make_room(self, nbytes: int) -> None:
        position = -(-self._position // STORAGE_ALIGNMENT) * STORAGE_ALIGNMENT
        self._position = position
        if position and position + nbytes > LARGEST_FILE_BYTES:
            self._full[self._name] = position
            self._name, self._position = f"__0_{len(self._full)}.distcp", 0

    def _path(self, name: str) -> str:
        return str(self._folder / name)

    def write(self, root: Path, checksums: Sequence[int]) -> None:
        """Write everything but the units' bytes, `.metadata` last.

        Args:
            checksums: the CRC-32 of each unit.
        """
        for item in self._items:
            with open_written(root / self._path(item.file)) as opened:
                for at, content in item.layout.parts([self._crc(item, checksums)]):
                    opened.seek(item.offset + at)
                    opened.write(content)
                if item.content:
                    opened.seek(item.offset + item.layout.starts[0])
                    opened.write(item.content)
        content = write_pickle(_metadata(self._items, self._types))
        write_synced(root / self._path(DCP_METADATA), content)

    def _crc(self, item: _Item, checksums: Sequence[int]) -> int:
        """The CRC-32 of an item's tensor."""
        crc = zlib.crc32(item.content)
        for number in item.units:
            crc = combine_crc32(crc, checksums[number], self.units[number].bytes)
        return crc


def _metadata(items: Sequence[_Item], types: Mapping[Key, tuple[str, tuple[int, ...]]]) -> Instance:
    """The torch.distributed.checkpoint.metadata.Metadata of a folder."""
    chunks: defaultdict[str, list[Instance]] = defaultdict(list)
    described: dict[str, Instance] = {}
    storage: list[tuple[Instance, Instance]] = []
    paths: dict[str, Key] = {}
    for item in items:
        key = ".".join(map(str, item.path))
        paths[key] = item.path
        at: Any = None
        number: int | None = None
        if item.box is None:
            described[key] = Instance(_named("BytesStorageMetadata"))
        else:
            at, number = size(item.box.start), len(chunks[key])
            chunk = {"offsets": at, "sizes": size(item.box.shape)}
            chunks[key].append(Instance(_named("ChunkStorageMetadata"), chunk))
            dtype, shape = types[item.path]
            described[key] = Instance(
                _named("TensorStorageMetadata"),
                {"properties": _properties(dtype), "size": size(shape), "chunks": chunks[key]},
            )
        index = {"fqn": key, "offset": at, "index": number}
        place = {
            "relative_path": item.file,
            "offset": item.offset,
            "length": item.layout.bytes,
        }
        info = Named("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        storage.append((Instance(_named("MetadataIndex"), index), Instance(info, place)))
    state = {
        "state_dict_metadata": described,
        "planner_data": paths,
        "storage_data": Pairs(tuple(storage)),
        "storage_meta": None,
        "version": None,
    }
    return Instance(_named("Metadata"), state)


def _named(name: str) -> Named:
    return Named("torch.distributed.checkpoint.metadata", name)


def _properties(dtype: str) -> Instance:
    """The properties of a contiguous tensor without gradient, as torch pickles them."""
    layout = Call(Named("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(_named("_MEM_FORMAT_ENCODING"), (0,))
    state = (Named("torch", TORCH_NAMES[dtype]), layout, False, contiguous, False)
    return Instance(_named("TensorProperties"), state)
