"""Blocks of optimizer state and who owns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.parallel.parameters import LayerSpec


@dataclass(frozen=True, slots=True)
class Block:
    """Whole rows of one segment: the unit of optimizer ownership."""

    index: int
    layer: int
    spec_index: int
    row_start: int
    row_stop: int
    elements: int


def blocks(
    layers: Sequence[LayerSpec], tensor_index: int, block_elements: int
) -> tuple[Block, ...]:
    found: list[Block] = []
    for layer, spec_of_layer in enumerate(layers):
        for spec_index, spec in enumerate(spec_of_layer.parameters[tensor_index]):
            if spec.tied_use:
                continue
            rows = max(1, block_elements // spec.row_elements)
            for start in range(0, spec.rows, rows):
                stop = min(spec.rows, start + rows)
                size = (stop - start) * spec.row_elements
                found.append(Block(len(found), layer, spec_index, start, stop, size))
    return tuple(found)


def assign_owners(
    sizes: Sequence[int],
    candidates: Sequence[tuple[int, ...]],
    previous: Sequence[int | None] | None = None,
) -> tuple[int, ...]:
    owners = []
    totals: dict[tuple[int, ...], int] = {}
    for size, group in zip(sizes, candidates, strict=True):
        totals[group] = totals.get(group, 0) + size
    seen: dict[tuple[int, ...], int] = {}
    for size, group in zip(sizes, candidates, strict=True):
        middle = seen.get(group, 0) + size / 2
        owners.append(group[min(len(group) - 1, int(middle * len(group) / totals[group]))])
        seen[group] = seen.get(group, 0) + size
    return tuple(owners)
