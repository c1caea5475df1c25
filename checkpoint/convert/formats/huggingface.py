"""Hugging Face model folders: safetensors or pytorch_model.bin, config.json, tokenizer files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from holdfast.checkpoint.convert.elements import (
    LogicalTensor,
    Output,
    SourceTensor,
    Unit,
    stored,
    units_of,
)
from holdfast.checkpoint.convert.formats.published import (
    SINGLE,
    WeightFiles,
    choose_files,
    published_rules,
)
from holdfast.checkpoint.convert.rules import builtin_rules
from holdfast.checkpoint.convert.sources import (
    Catalog,
    ReadOptions,
    WriteOptions,
    choose_output_dtypes,
    files_for,
    left_files,
    make_catalog,
    read_torch_file,
    tensors_in,
)
from holdfast.checkpoint.convert.writing import write_files
from holdfast.checkpoint.format import (
    ALIGNMENT,
    BUFFER,
    ELEMENT_BYTES,
    INDEX,
    WEIGHT,
    decode_entries,
    decode_index,
    read_header,
)
from holdfast.checkpoint.model_config import read_config
from holdfast.checkpoint.stores import open_written, write_synced
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box
from holdfast.parallel.optimizer import MASTER
from holdfast.parallel.reading import read_regular

NAME = "hf"
RULES = "huggingface"
LARGEST_FILE_BYTES = 5_000_000_000
"""The largest file of several, as transformers cuts them."""


def read(path: Path, options: ReadOptions) -> Catalog:
    """Read the tensors of a model folder.

    Raises:
        CheckpointError: a file is missing or truncated, no file has a tensor of the index, or the
            folder holds no model.
    """
    root = path.parent if path.is_file() else path
    chosen = WeightFiles((path.name,)) if path.is_file() else choose_files(root)
    mapped = _weight_map(root / chosen.index) if chosen.index else {}
    names = chosen.names or tuple(dict.fromkeys(mapped.values()))
    others: dict[str, str] = {}
    tensors = [tensor for name in names for tensor in _tensors(root, name, others)]
    _check_index(root, tensors, mapped)
    book = published_rules(builtin_rules(RULES), _config(root, options), tensors, root)
    catalog = make_catalog(RULES, root, tensors, options, rules=book)
    catalog.format = NAME
    catalog.left_out |= {**chosen.left_out, **others}
    if not path.is_file():
        catalog.left_out |= left_files(root, {*names, chosen.index, *chosen.left_out})
    return catalog


def _config(root: Path, options: ReadOptions) -> dict[str, Any]:
    """The keys of the config.json that counts; none if there is no such file."""
    path = (options.model_files or root) / "config.json"
    try:
        return read_config(read_regular(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} is damaged: {reason}") from error


def _tensors(root: Path, name: str, others: dict[str, str]) -> list[SourceTensor]:
    """The tensors of a file; `others` gets what else it has, which transformers passes over."""
    if not name.endswith(".bin"):
        return read_safetensors(root, name)
    file = read_torch_file(root, name)
    found = [file.source(".".join(path), tensor) for path, tensor in tensors_in(file.content)]
    if isinstance(file.content, Mapping):
        for key, value in file.content.items():
            if next(tensors_in(value), None) is None:
                others[str(key)] = "no tensor"
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = read_regular(index)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    return decode_index(content, str(index))


def _check_index(root: Path, tensors: Sequence[SourceTensor], mapped: Mapping[str, str]) -> None:
    where = {t.key: t.pieces[0].locations[0].file for t in tensors}
    for name, file in mapped.items():
        if where.get(name) != file:
            raise CheckpointError(f"{root}: the index says that {name} is in {file}, and it is not")


def read_safetensors(root: Path, name: str) -> list[SourceTensor]:
    """Read the tensors of one safetensors file from its header.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file, or its tensors
            overlap.
    """
    path = root / name
    size, header = read_header(path)
    length = len(header)
    entries = decode_entries(header, str(path))
    tensors, end = [], 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype, shape, (start, stop) = entry.dtype, entry.shape, entry.data_offsets
        if dtype not in ELEMENT_BYTES:
            raise CheckpointError(f"{path}: {key} has dtype {dtype}, which is not supported")
        if start != end or stop - start != Box.whole(shape).elements * ELEMENT_BYTES[dtype]:
            raise CheckpointError(
                f"{path} is damaged: {key} {dtype} {shape} cannot lie at bytes {start} to {stop}"
            )
        tensors.append(stored(key, dtype, shape, name, length + start))
        end = stop
    if length + end != size:
        raise CheckpointError(
            f"{path} has {size} bytes and its header speaks of {length + end}; it is truncated, or "
            "not completely copied"
        )
    return tensors


def plan(catalog: Catalog, options: WriteOptions) -> Output:
    """Plan a model folder with the weights of the source."""
    chosen = [
        (tensor, out)
        for tensor, out in choose_output_dtypes(catalog, options.dtype, masters=False)
        if tensor.kind in (WEIGHT, BUFFER)
    ]
    if not chosen:
        raise CheckpointError(f"{catalog.root} holds no weights")
    refuse_foreign_names((tensor.name for tensor, _ in chosen), str(catalog.root))
    types = {tensor.name: out for tensor, out in chosen if tensor.kind == WEIGHT}
    for tensor in catalog.tensors:
        same = tensor.kind == MASTER and types[tensor.name] == tensor.dtype
        if not same and tensor.kind not in (WEIGHT, BUFFER):
            catalog.left_out[tensor.full_name] = (
                f"Hugging Face folders hold weights only, and no {tensor.kind}"
            )
    if "config.json" not in files_for(catalog, chosen):
        catalog.left_out["config.json"] = (
            "the source has none, and transformers loads no model without it; give --model-files, "
            "or write one into the folder"
        )
    beside = catalog.files
    if catalog.format == "holdfast" and not any("token" in name for name in beside):
        catalog.left_out["tokenizer.json"] = (
            "the source has none: its data was tokenized before, or is synthetic"
        )
    shelves = _shelves(chosen)
    files: dict[str, int] = {}
    headers: dict[str, bytes] = {}
    units: list[Unit] = []
    for number, shelf in enumerate(shelves, 1):
        name = (
            SINGLE if len(shelves) == 1 else f"model-{number:05d}-of-{len(shelves):05d}.safetensors"
        )
        headers[name] = safetensors_header(shelf)
        position = len(headers[name])
        for tensor, out in shelf:
            units += units_of(tensor, Box.whole(tensor.shape), out, name, position)
            position += _bytes(tensor, out)
        files[name] = position

    def finish(folder: Path, checksums: Sequence[int]) -> None:
        for name, header in headers.items():
            with open_written(folder / name) as opened:
                opened.write(header)
        write_files(folder, files_for(catalog, chosen))
        if len(shelves) > 1:
            write_synced(folder / INDEX, _index(shelves, list(files)))

    return Output(files, units, finish, chosen)


_PAIRED = re.compile(r"(.*\.)?layers\.\d+\.attention\.w[qk]\.(weight|bias)")


def refuse_foreign_names(names: Iterable[str], where: str) -> None:
    """Refuse names under which transformers would find no weights, or weights in another order.

    Raises:
        CheckpointError: a name is torchtitan's, or is a path in a state of more than a model.
    """
    for name in names:
        if _PAIRED.fullmatch(name):
            raise CheckpointError(
                f"{where}: {name} is a name of torchtitan (and of Meta's own Llama files), whose "
                "queries and keys are in another order than transformers reads; write the model "
                "with torchtitan's scripts/checkpoint_conversion/convert_to_hf.py, or convert to "
                "another format, which keeps names and order"
            )
        if "/" in name:
            raise CheckpointError(
                f"{where}: {name} is a path in a state of more than a model, and no name of a "
                "weight; leave it out by a [[skip]], or name it by a [[rule]], in a file for --map"
            )


def _shelves(chosen: Sequence[tuple[LogicalTensor, str]]) -> list[list[tuple[LogicalTensor, str]]]:
    """The tensors of each file, in their order there."""
    shelves: list[list[tuple[LogicalTensor, str]]] = []
    size = LARGEST_FILE_BYTES + 1
    for tensor, out in chosen:
        length = _bytes(tensor, out)
        if size + length > LARGEST_FILE_BYTES:
            shelves.append([])
            size = 0
        shelves[-1].append((tensor, out))
        size += length
    for shelf in shelves:
        # Wide types come first, so that each tensor begins at a multiple of its element's size.
        shelf.sort(key=lambda item: -ELEMENT_BYTES[item[1]])
    return shelves


def _index(shelves: Sequence[Sequence[tuple[LogicalTensor, str]]], files: list[str]) -> bytes:
    mapped = {
        tensor.name: file for file, shelf in zip(files, shelves, strict=True) for tensor, _ in shelf
    }
    total = sum(_bytes(tensor, out) for shelf in shelves for tensor, out in shelf)
    text = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapped.items()))}
    return (json.dumps(text, indent=2) + "\n").encode()


def _bytes(tensor: LogicalTensor, dtype: str) -> int:
    return Box.whole(tensor.shape).elements * ELEMENT_BYTES[dtype]


def safetensors_header(tensors: Sequence[tuple[LogicalTensor, str]]) -> bytes:
    """The header of a file with these tensors in this order, padded to a multiple of ALIGNMENT."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor, dtype in tensors:
        end = position + _bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": dtype,
            "shape": tensor.shape,
            "data_offsets": (position, end),
        }
        position = end
    text = msgspec.json.encode(header)
    capacity = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    return (capacity - 8).to_bytes(8, "little") + text.ljust(capacity - 8)
