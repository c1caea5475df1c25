"""Quantised sources: the block scales of 8-bit weights are applied; other methods are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from holdfast.checkpoint.convert.elements import (
    EIGHT_BITS,
    BlockScale,
    BlockScales,
    LogicalTensor,
    Unit,
)
from holdfast.checkpoint.convert.sources.engine import Engine
from holdfast.checkpoint.format import WEIGHT
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box
from holdfast.parallel.reading import parse_json

SCALE = "_scale_inv"
"""The suffix that a weight's name gets for its scales."""
_ACTIVATIONS = (".activation_scale", ".input_scale")
_SCALE_TYPES = ("F32", "BF16", "F16")
_METHOD = "fp8"


def method_of(files: Mapping[str, bytes]) -> tuple[str, tuple[int, int] | None]:
    """The `quant_method` in config.json and its block of weights; "" where there is none."""
    try:
        described = parse_json(files.get("config.json", b"{}"))
    except ValueError:
        return "", None
    told = described.get("quantization_config") if isinstance(described, dict) else None
    if not isinstance(told, dict):
        return "", None
    block = told.get("weight_block_size")
    sizes = tuple(block) if isinstance(block, list) and len(block) == 2 else None
    return str(told.get("quant_method", "unknown")), sizes


def find_scales(
    root: Path, tensors: list[LogicalTensor], files: Mapping[str, bytes], dtype: str
) -> tuple[list[LogicalTensor], BlockScales, dict[str, str]]:
    """The tensors of a source without its scales, the scales, and why each of them is left out.

    Args:
        root: the folder that locations are relative to.
        files: the small files beside the weights, config.json among them.
        dtype: the type that is asked for.
    Raises:
        CheckpointError: the source is quantised in another way, or a scale does not fit.
    """
    method, block = method_of(files)
    named = {tensor.name: tensor for tensor in tensors if tensor.kind == WEIGHT}
    weights = [tensor for tensor in named.values() if tensor.dtype in EIGHT_BITS]
    if method not in ("", _METHOD):
        raise CheckpointError(
            f"{root} is quantised by {method} (quantization_config), which is not undone here; "
            "write it in 16 bits with the library that made it, or leave out --dtype, which copies "
            "it"
        )
    pairs = [(w, named[w.name + SCALE]) for w in weights if w.name + SCALE in named]
    if dtype in EIGHT_BITS and (method or pairs):
        raise CheckpointError(
            f"{root} has 8-bit weights with scales already; leave out --dtype, which copies them, "
            "or ask for more bits"
        )
    _check_unscaled(root, weights, pairs, named, method)
    left_out = {scale.name: "applied to its 8-bit weight" for _, scale in pairs}
    if pairs:
        left_out |= {
            name: "the scale of activations, which weights of more bits do not need"
            for name in named
            if name.endswith(_ACTIVATIONS)
        }
    scales = [one for weight, scale in pairs for one in _scales_of(root, weight, scale, block)]
    kept = [t for t in tensors if t.kind != WEIGHT or t.name not in left_out]
    return kept, BlockScales(scales), left_out


def without_quantisation(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The small files beside weights that are no longer quantised."""
    described = parse_json(files.get("config.json", b"{}"))
    if "quantization_config" not in described:
        return dict(files)
    del described["quantization_config"]
    return {**files, "config.json": (json.dumps(described, indent=2) + "\n").encode()}


def _check_unscaled(
    root: Path,
    weights: list[LogicalTensor],
    pairs: list[tuple[LogicalTensor, LogicalTensor]],
    named: Mapping[str, LogicalTensor],
    method: str,
) -> None:
    """Refuse 8-bit weights that have scales under other names, or lack them."""
    scaled = {weight.name for weight, _ in pairs}
    for weight in weights:
        if weight.name in scaled:
            continue
        module = weight.name.rpartition(".")[0]
        other = next((n for n in named if n.startswith(f"{module}.") and "scale" in n), "")
        if other or method or pairs:
            told = f"scales under another name ({other})" if other else "no scales"
            raise CheckpointError(
                f"{root}: {weight.name} is {weight.dtype} and has {told}; scales are read from "
                f"{weight.name}{SCALE}. Leave out --dtype to copy it as it is"
            )


def _scales_of(
    root: Path, weight: LogicalTensor, scale: LogicalTensor, block: tuple[int, int] | None
) -> Iterator[BlockScale]:
    """The scales of each piece of a weight."""
    if len(weight.shape) != 2 or scale.dtype not in _SCALE_TYPES or len(scale.shape) not in (0, 2):
        raise CheckpointError(
            f"{root}: {weight.name} {list(weight.shape)} with scales {scale.dtype} "
            f"{list(scale.shape)}: matrices with scales of {', '.join(_SCALE_TYPES)} are supported"
        )
    grid = scale.shape or (1, 1)
    sizes = _block(root, weight, grid, block)
    with Engine(root, None) as engine:
        content = engine.content(Unit(scale, Box.whole(scale.shape), "F32", "", 0))
    values = np.frombuffer(content, np.float32).reshape(grid)
    for piece in weight.pieces:
        for place in piece.locations:
            rows, columns = piece.box.shape
            if place.strides[1] != 1 and columns > 1:
                raise CheckpointError(f"{root}: {weight.name} lies column by column")
            stride = place.strides[0] if rows > 1 else columns
            end = place.offset + (rows - 1) * stride + columns
            start = piece.box.start[0], piece.box.start[1]
            yield BlockScale(place.file, place.offset, end, start, stride, sizes, values)


def _block(
    root: Path, weight: LogicalTensor, grid: tuple[int, ...], told: tuple[int, int] | None
) -> tuple[int, int]:
    """The rows and columns that share a scale: as config.json says and as the grid divides them.

    Raises:
        CheckpointError: the two disagree, or the grid does not divide the matrix.
    """
    shape = weight.shape
    even = not any(size % count for size, count in zip(shape, grid, strict=True))
    derived = (shape[0] // grid[0], shape[1] // grid[1])
    if told is None or grid == (1, 1):
        if even:
            return derived
        sizes = None
    else:
        fits = all(-(-s // b) == n for s, b, n in zip(shape, told, grid, strict=True))
        partial = any(b < s and s % b for s, b in zip(shape, told, strict=True))
        # transformers takes blocks of equal size, which only a whole number of blocks are.
        sizes = told if fits and not (partial and even) else None
    if sizes is None:
        raise CheckpointError(
            f"{root}: {weight.name} {list(shape)} has scales {list(grid)}, and blocks of "
            f"{list(told) if told else 'equal size'} do not fit both"
        )
    return sizes
