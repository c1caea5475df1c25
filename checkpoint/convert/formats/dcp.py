"""torch.distributed.checkpoint (FSDP2, torchtitan): `.metadata` and `.distcp` files of items."""

from __future__ import annotations

import pickle
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint import directory
from holdfast.checkpoint.convert.catalog import (
    Catalog,
    ReadOptions,
    make_catalog,
    settle_precision,
)
from holdfast.checkpoint.convert.engine import Engine
from holdfast.checkpoint.convert.output import Output, Unit, row_boxes, units_of
from holdfast.checkpoint.convert.pickles import Record, StoredTensor, plain, read_pickle
from holdfast.checkpoint.convert.pieces import Logical, Piece, SourceTensor
from holdfast.checkpoint.convert.torch_files import TorchFile, read_torch_item
from holdfast.checkpoint.convert.torch_writing import (
    STORAGE_ALIGNMENT,
    TORCH_FILE_DTYPES,
    TensorToCome,
    TorchLayout,
    combine_crc32,
    lay_out,
)
from holdfast.checkpoint.dtypes import TORCH_DTYPES
from holdfast.checkpoint.format import ELEMENT_BYTES
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

NAME = "dcp"
METADATA = ".metadata"
ITEM_BYTES = 64 << 20
"""A reader takes an item whole, so that items are not larger than this (or one row)."""
LARGEST_FILE_BYTES = 4 << 30
_ADAMW = {
    "amsgrad": False,
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""What torch.optim.AdamW keeps beside its hyperparameters, as it is by default."""


def recognise(path: Path) -> bool:
    """Whether a path is a folder that torch.distributed.checkpoint has written."""
    return (path / METADATA).is_file()


@dataclass(slots=True)
class Items:
    """All items of a folder."""

    tensors: list[SourceTensor]
    objects: dict[str, Any]
    """By path: what is no tensor, if it is plain values; `Record`s and the like as they are."""


def read_items(path: Path) -> Items:
    """Every tensor, with its shards put together, and every object of a folder.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or asks for a type that is refused.
    """
    where = str(path / METADATA)
    try:
        content = (path / METADATA).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror}") from error
    metadata = read_pickle(content, where)
    described = _field(metadata, "state_dict_metadata", where)
    paths = metadata.get("planner_data")
    named = paths if isinstance(paths, Mapping) else {}
    chunks: defaultdict[str, dict[tuple[int, ...], TorchFile]] = defaultdict(dict)
    for (key, offset), item in _opened(path, _field(metadata, "storage_data", where)):
        chunks[key][offset] = item
    found = Items([], {})
    for key, entry in described.items():
        name = "/".join(map(str, named.get(key, (key,))))
        if entry.type_name.endswith(".BytesStorageMetadata"):
            [item] = chunks[key].values() or [None]
            found.objects[name] = None if item is None else item.content
        else:
            found.tensors.append(_tensor(name, key, entry, chunks[key], where))
    return found


def _field(record: Any, name: str, where: str) -> Any:
    value = record.get(name) if isinstance(record, Record) else None
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} is not the metadata of torch.distributed.checkpoint")
    return value


def _opened(
    path: Path, storage: Mapping[Any, Any]
) -> Iterator[tuple[tuple[str, tuple[int, ...]], TorchFile]]:
    by_file: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
    for index, info in storage.items():
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{path}: {index.get('fqn')} is stored with {info.get('transform_descriptors')}, which is "
                "not supported; save it without stream transforms"
            )
        by_file[str(info.get("relative_path"))].append((index, info))
    for file, items in by_file.items():
        where = path / file
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{path}: its metadata names {file}, outside of the folder")
        try:
            size = where.stat().st_size
            with where.open("rb") as opened:
                for index, info in items:
                    offset, length = int(info.get("offset")), int(info.get("length"))
                    if offset + length > size:
                        raise CheckpointError(
                            f"{where} is truncated: it has {size} bytes, and {index.get('fqn')} lies up to "
                            f"{offset + length}"
                        )
                    item = read_torch_item(
                        opened, offset, length, file, f"{where} at byte {offset}"
                    )
                    at = tuple(index.get("offset") or ())
                    yield (str(index.get("fqn")), at), item
        except OSError as error:
            raise CheckpointError(f"{where} cannot be read: {error.strerror}") from error


def _tensor(
    name: str, key: str, entry: Any, items: Mapping[tuple[int, ...], TorchFile], where: str
) -> SourceTensor:
    shape = tuple(entry.get("size"))
    pieces, dtypes = [], set()
    for chunk in entry.get("chunks"):
        start, extent = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        item = items.get(start)
        if item is None:
            raise CheckpointError(f"{where}: no file holds {key} at {list(start)}")
        content = item.content
        if not isinstance(content, StoredTensor) or content.shape != extent:
            raise CheckpointError(
                f"{where}: the item of {key} at {list(start)} is not a tensor of shape {list(extent)}"
            )
        source = item.source(key, content)
        dtypes.add(source.dtype)
        box = Box(start, tuple(a + n for a, n in zip(start, extent, strict=True)))
        pieces.append(Piece(box, source.pieces[0].places))
    if len(dtypes) != 1:
        raise CheckpointError(f"{where}: {key} has chunks of types {sorted(dtypes)}")
    return SourceTensor(name, dtypes.pop(), shape, tuple(pieces))


def read(path: Path, options: ReadOptions) -> Catalog:
    """The tensors of a folder; objects made of plain values go along.

    Raises:
        CheckpointError: see `read_items`.
    """
    items = read_items(path)
    catalog = make_catalog(NAME, path, items.tensors, options)
    objects = {}
    for name, value in items.objects.items():
        objects[name] = plain(value)
        if objects[name] is None and value is not None:
            del objects[name]
            catalog.left_out[name] = "an object that is not made of numbers, text, lists and dicts"
    catalog.scalars["objects"] = objects
    catalog.step = _step(catalog, path)
    if catalog.of_kind("exp_avg"):
        catalog.scalars["optimizer_step"] = catalog.step
    return catalog


def _step(catalog: Catalog, path: Path) -> int:
    """Of the optimizer; else what the folder's name says."""
    counts = [tensor for tensor in catalog.of_kind("step") if not tensor.shape]
    if counts:
        with Engine(path, None) as engine:
            unit = Unit(counts[0], Box((), ()), counts[0].dtype, "", 0)
            return int(engine.values(unit).item())
    found = re.search(r"(\d+)$", path.resolve().name)
    return int(found[1]) if found else 0


@dataclass(frozen=True, slots=True)
class _Item:
    """A chunk of a tensor, or an object, in the file that it will be in."""

    path: tuple[Any, ...]
    layout: TorchLayout
    file: str
    offset: int
    box: Box | None = None
    units: range = range(0)
    content: bytes = b""
    """Of a tensor that is made here."""


def plan(catalog: Catalog, dtype: str) -> Output:
    """A folder with {"model": ..., "optim": ...} in the form of torch.distributed.checkpoint.state_dict."""
    settled = settle_precision(catalog, dtype, masters=True)
    for tensor, out in settled:
        if out not in TORCH_FILE_DTYPES:
            raise CheckpointError(f"{tensor.full_name} has dtype {out}, which cannot be written so")
    items: list[_Item] = []
    units: list[Unit] = []
    files: dict[str, int] = {}
    name, position = "__0_0.distcp", 0

    def room(nbytes: int) -> None:
        nonlocal name, position
        position = -(-position // STORAGE_ALIGNMENT) * STORAGE_ALIGNMENT
        if position and position + nbytes > LARGEST_FILE_BYTES:
            files[name] = position
            name, position = f"__0_{len(files)}.distcp", 0

    for tensor, out in settled:
        for box in row_boxes(Box.whole(tensor.shape), ELEMENT_BYTES[out], ITEM_BYTES):
            come = TensorToCome(0, out, box.shape)
            layout = lay_out(come, [come])
            room(layout.bytes)
            first = len(units)
            units += units_of(tensor, box, out, name, position + layout.starts[0])
            items.append(
                _Item(_path_of(tensor), layout, name, position, box, range(first, len(units)))
            )
            position += layout.bytes
    steps, objects = _made_here(catalog)
    for path, value in [*steps.items(), *objects.items()]:
        count = path in steps
        come = TensorToCome(0, "F32", ())
        layout = lay_out(come, [come]) if count else lay_out(value, [])
        room(layout.bytes)
        content = torch.tensor(float(value)).numpy().tobytes() if count else b""
        box = Box((), ()) if count else None
        items.append(_Item(path, layout, name, position, box, content=content))
        position += layout.bytes
    files[name] = position
    types = {_path_of(tensor): (tensor, out) for tensor, out in settled}

    def finish(folder: Path, checksums: Sequence[int]) -> None:
        for item in items:
            with (folder / item.file).open("r+b") as opened:
                for at, content in item.layout.parts([_crc(item, units, checksums)]):
                    opened.seek(item.offset + at)
                    opened.write(content)
                if item.content:
                    opened.seek(item.offset + item.layout.starts[0])
                    opened.write(item.content)
        for carried, content in catalog.files.items():
            directory.write_synced(folder / carried, content)
        directory.write_synced(folder / METADATA, pickle.dumps(_metadata(items, types)))

    added = frozenset(f"step.{path[2]}" for path in steps)
    return Output(files, units, finish, settled, "crc32", added)


def _path_of(tensor: Logical) -> tuple[Any, ...]:
    if tensor.kind in ("weight", "buffer", "tensor"):
        return "model", tensor.name
    return "optim", "state", tensor.name, tensor.kind


def _made_here(catalog: Catalog) -> tuple[dict[tuple[Any, ...], int], dict[tuple[Any, ...], Any]]:
    """What an optimizer's state has beside tensors: (step by path, other values by path)."""
    trained = [tensor.name for tensor in catalog.of_kind("exp_avg")]
    told = catalog.scalars.get("objects", {})
    objects = {_split(name): value for name, value in told.items()}
    if not trained:
        return {}, objects
    steps: dict[tuple[Any, ...], int] = {}
    if not catalog.of_kind("step"):
        count = int(catalog.scalars.get("optimizer_step", catalog.step))
        steps = {("optim", "state", name, "step"): count for name in trained}
    if not objects:
        optimizer = catalog.config.get("optimizer", {})
        group = {
            "lr": optimizer.get("lr", 1e-3),
            "betas": tuple(optimizer.get("betas", (0.9, 0.999))),
            "eps": optimizer.get("eps", 1e-8),
            "weight_decay": optimizer.get("weight_decay", 0.01),
            "params": trained,
            **_ADAMW,
        }
        objects = {("optim", "param_groups", 0, key): value for key, value in group.items()}
    return steps, objects


def _split(name: str) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("/"))


def _crc(item: _Item, units: Sequence[Unit], checksums: Sequence[int]) -> int:
    """CRC-32 of an item's tensor."""
    crc = zlib.crc32(item.content)
    for number in item.units:
        crc = combine_crc32(crc, checksums[number], units[number].bytes)
    return crc


def _metadata(items: Sequence[_Item], types: Mapping[tuple[Any, ...], tuple[Logical, str]]) -> Any:
    """The torch.distributed.checkpoint.metadata.Metadata of a folder."""
    # Only where it is written: importing it takes longer than most conversions.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    paths: dict[str, Any] = {}
    for item in items:
        key = ".".join(map(str, item.path))
        info = _StorageInfo(item.file, item.offset, item.layout.bytes)
        if item.box is None:
            described[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = info
        else:
            start, extent = torch.Size(item.box.start), torch.Size(item.box.shape)
            if key not in described:
                tensor, out = types.get(item.path, (None, "F32"))
                described[key] = TensorStorageMetadata(
                    TensorProperties(dtype=TORCH_DTYPES[out]),
                    torch.Size(() if tensor is None else tensor.shape),
                    [],
                )
            number = len(described[key].chunks)
            described[key].chunks.append(ChunkStorageMetadata(start, extent))
            storage[MetadataIndex(key, start, number)] = info
        paths[key] = item.path
    return Metadata(described, paths, storage)
