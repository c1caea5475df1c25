"""torch.distributed.checkpoint (FSDP2, torchtitan): `.metadata` and `.distcp` files of items."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import (
    LogicalTensor,
    Output,
    SourcePiece,
    SourceTensor,
    Unit,
    number,
)
from holdfast.checkpoint.convert.sources import (
    DCP_METADATA,
    Catalog,
    Engine,
    PickledObject,
    ReadOptions,
    StoredTensor,
    TorchFile,
    WriteOptions,
    choose_output_dtypes,
    files_for,
    make_catalog,
    plain,
    read_pickle,
    read_torch_item,
    unplain,
)
from holdfast.checkpoint.convert.writing import DistcpFolder, write_files
from holdfast.checkpoint.format import STEP, UNPREFIXED_KINDS, full_name
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box
from holdfast.parallel.optimizer import OPTIMIZERS
from holdfast.parallel.reading import open_regular, read_regular

NAME = "dcp"
_UNPLAIN = "an object that is not made of numbers, text, lists and dicts"
_ADAMW = {
    "amsgrad": False,
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""The default values of torch.optim.AdamW's settings, which an output lists."""
_INDEX = re.compile(r"0|[1-9][0-9]*")
"""The position in a list as a part of a path."""


@dataclass(slots=True)
class Items:
    """All items of a folder."""

    tensors: list[SourceTensor]
    objects: dict[str, Any]
    """By path: the objects that are not tensors, as plain values, or as `PickledObject`s and the
    like."""


def read_items(path: Path) -> Items:
    """Read every tensor of a folder, with its shards joined, and every object.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or names a type that is refused.
    """
    where = str(path / DCP_METADATA)
    try:
        content = read_regular(path / DCP_METADATA)
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
    value = record.get(name) if isinstance(record, PickledObject) else None
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
                f"{path}: {index.get('fqn')} is stored with {info.get('transform_descriptors')}, "
                "which is not supported; save it without stream transforms"
            )
        by_file[str(info.get("relative_path"))].append((index, info))
    for file, items in by_file.items():
        where = path / file
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise CheckpointError(f"{path}: its metadata names {file}, outside of the folder")
        try:
            with open_regular(where) as opened:
                size = os.fstat(opened.fileno()).st_size
                for index, info in items:
                    offset, length = int(info.get("offset")), int(info.get("length"))
                    if min(offset, length) < 0 or offset + length > size:
                        raise CheckpointError(
                            f"{where} is truncated: it has {size} bytes, and {index.get('fqn')} "
                            f"lies up to {offset + length}"
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
    pieces, dtypes, records = [], set(), {}
    for chunk in entry.get("chunks"):
        start, extent = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        item = items.get(start)
        if item is None:
            raise CheckpointError(f"{where}: no file holds {key} at {list(start)}")
        content = item.content
        if not isinstance(content, StoredTensor) or content.shape != extent:
            raise CheckpointError(
                f"{where}: the item of {key} at {list(start)} is not a tensor of shape "
                f"{list(extent)}"
            )
        source = item.source(key, content)
        dtypes.add(source.dtype)
        records |= source.records
        box = Box(start, tuple(a + n for a, n in zip(start, extent, strict=True)))
        pieces.append(SourcePiece(box, source.pieces[0].locations))
    if len(dtypes) != 1:
        raise CheckpointError(f"{where}: {key} has chunks of types {sorted(dtypes)}")
    return SourceTensor(name, dtypes.pop(), shape, tuple(pieces), records=records)


def read(path: Path, options: ReadOptions) -> Catalog:
    """Read the tensors of a folder, and the objects made of plain values.

    Raises:
        CheckpointError: see `read_items`.
    """
    items = read_items(path)
    catalog = make_catalog(NAME, path, items.tensors, options)
    objects = {}
    for name, value in items.objects.items():
        made = plain(value)
        lost = list(unplain(value, name))
        if lost and not isinstance(value, Mapping):
            # A list without some of its items would be another one.
            lost = [name]
        else:
            objects[name] = made
        catalog.left_out |= dict.fromkeys(lost, _UNPLAIN)
    catalog.scalars["objects"] = objects
    catalog.step = _step(catalog, path)
    if catalog.state_kinds():
        catalog.scalars["optimizer_step"] = catalog.step
    return catalog


def _step(catalog: Catalog, path: Path) -> int:
    """The step of the optimizer; without one, the step in the folder's name."""
    counts = [tensor for tensor in catalog.of_kind(STEP) if not tensor.shape]
    if counts:
        with Engine(path, None) as engine:
            unit = Unit(counts[0], Box((), ()), counts[0].dtype, "", 0)
            return int(number(engine.content(unit), unit.dtype))
    found = re.search(r"(\d+)$", path.resolve().name)
    return int(found[1]) if found else 0


def plan(catalog: Catalog, options: WriteOptions) -> Output:
    """Plan a folder with {"model": ..., "optim": ...}, as torch's state_dict functions give it."""
    typed = choose_output_dtypes(catalog, options.dtype, masters=True)
    folder = DistcpFolder()
    for tensor, out in typed:
        folder.add(_path_of(tensor), tensor, out)
    steps, objects = _made_here(catalog)
    for path, count in steps.items():
        folder.add_number(path, count)
    for path, value in objects.items():
        folder.add_object(path, value)

    def finish(root: Path, checksums: Sequence[int]) -> None:
        write_files(root, files_for(catalog, typed))
        folder.write(root, checksums)

    added = frozenset(full_name(STEP, path[2]) for path in steps)
    return Output(folder.files, folder.units, finish, typed, "crc32", added)


def _path_of(tensor: LogicalTensor) -> tuple[Any, ...]:
    if tensor.kind in UNPREFIXED_KINDS:
        return "model", tensor.name
    return "optim", "state", tensor.name, tensor.kind


def _made_here(catalog: Catalog) -> tuple[dict[tuple[Any, ...], int], dict[tuple[Any, ...], Any]]:
    """The optimizer state that is no tensor: (step by path, other values by path)."""
    trained = catalog.trained()
    told = catalog.scalars.get("objects", {})
    objects = {_split(name): value for name, value in told.items()}
    if not trained:
        return {}, objects
    steps: dict[tuple[Any, ...], int] = {}
    if not catalog.of_kind(STEP):
        count = int(catalog.scalars.get("optimizer_step", catalog.step))
        steps = {("optim", "state", name, STEP): count for name in trained}
    if not objects:
        group = _parameter_group(catalog, trained)
        objects = {("optim", "param_groups", 0, key): value for key, value in group.items()}
    return steps, objects


def _parameter_group(catalog: Catalog, trained: Sequence[str]) -> dict[str, Any]:
    """The settings of a run under torch.optim's names; AdamW's defaults for other sources."""
    catalog.leave_out_groups()
    optimizer = catalog.config.get("optimizer", {})
    rate, decay = optimizer.get("lr", 1e-3), optimizer.get("weight_decay", 0.01)
    kinds = catalog.state_kinds()
    if not catalog.has_states_of(OPTIMIZERS["adamw"]):
        catalog.left_out["param_groups"] = (
            f"settings beside lr and weight_decay: of the optimizer that keeps {', '.join(kinds)}, "
            "torch's names are not known"
        )
        return {"lr": rate, "weight_decay": decay, "params": trained}
    return {
        "lr": rate,
        "betas": tuple(optimizer.get("betas", (0.9, 0.999))),
        "eps": optimizer.get("eps", 1e-8),
        "weight_decay": decay,
        "params": trained,
        **_ADAMW,
    }


def _split(name: str) -> tuple[Any, ...]:
    return tuple(int(part) if _INDEX.fullmatch(part) else part for part in name.split("/"))
