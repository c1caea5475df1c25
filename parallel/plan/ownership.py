"""Blocks of optimizer state, and the ranks that own them. Pure; needs no torch."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from holdfast.parallel.layout import LayerSpec, ParameterSpec

T = TypeVar("T")
BlockKey = tuple[int, int]
"""(part, position among its blocks): the name of a block in the whole run."""


_ELEMENT_FLOPS = 16
"""Operations of AdamW for one element."""


@dataclass(frozen=True, slots=True)
class Block:
    """Whole rows of one segment of a parameter: the unit of optimizer ownership."""

    part: int
    """The part of the parameters that it is of; the first one that has its rows."""
    index: int
    """The position among the blocks of its part."""
    layer: int
    spec_index: int
    """The row of its segment in the layer's parameter table."""
    row_start: int
    """The first row, counted in the segment."""
    row_stop: int
    elements: int
    weight: int = 0
    """The work of its update, beside others': of a matrix its share. 0: as its elements."""

    @property
    def work(self) -> int:
        """What owners and shadows are balanced by."""
        return self.weight or self.elements

    @property
    def key(self) -> BlockKey:
        return self.part, self.index


def blocks(layers: Sequence[LayerSpec], part: int, block_elements: int) -> tuple[Block, ...]:
    """All blocks of one part of the parameters, in layer, table and row order.

    A block has as many whole rows as fit into `block_elements`, and one at least; all rows that the
    part has of a matrix that is updated as one. Blocks depend
    only on the model and its split into parts. Rows that several parts have are blocks of the first
    of these. The second use of a tied weight has none: it shares those of the first.
    """
    found: list[Block] = []
    for layer, layer_spec in enumerate(layers):
        for spec_index, spec in enumerate(layer_spec.parameters[part]):
            if spec.tied_use or spec.copies[0] != part:
                continue
            rows = spec.rows if spec.whole else max(1, block_elements // spec.row_elements)
            for start in range(0, spec.rows, rows):
                stop = min(spec.rows, start + rows)
                elements = (stop - start) * spec.row_elements
                weight = _share_of_work(spec, elements)
                found.append(
                    Block(part, len(found), layer, spec_index, start, stop, elements, weight)
                )
    return tuple(found)


def _share_of_work(spec: ParameterSpec, elements: int) -> int:
    """The work of a block of what is updated as one: as much as it has of the elements."""
    if spec.whole is None:
        return 0
    rows = spec.whole.shape[0]
    return matrix_work(rows, spec.whole.elements // rows) * elements // spec.whole.elements


def split_matrices(
    layers: Sequence[LayerSpec], found: Sequence[Sequence[Block]]
) -> tuple[tuple[BlockKey, ...], ...]:
    """The blocks of each matrix that is updated as one and has boxes in several parts. Pure.

    They have one owner and the same followers, which so have all that the update needs.

    Args:
        found: the blocks of each part.
    Returns:
        Of each matrix its blocks, by part; by layer and row.
    """
    matrices: dict[tuple[int, int, str], list[BlockKey]] = {}
    for of_part in found:
        for block in of_part:
            spec = layers[block.layer].parameters[block.part][block.spec_index]
            if spec.whole is not None and spec.whole != spec.box:
                place = block.layer, block.spec_index, spec.name
                matrices.setdefault(place, []).append(block.key)
    return tuple(tuple(matrices[place]) for place in sorted(matrices))


Together = tuple[BlockKey, ...]
"""The blocks that have one owner, and the same followers: one, or those of a split matrix."""


def given_together(
    found: Sequence[Sequence[Block]], matrices: Sequence[Together]
) -> tuple[tuple[Together, ...], ...]:
    """The blocks in the order in which ranks are given them. Pure.

    First the split matrices, which any rank of their stage may own, then each part's other blocks.

    Args:
        found: the blocks of each part.
        matrices: as of `split_matrices`.
    """
    split = {key for keys in matrices for key in keys}
    others = (tuple((b.key,) for b in of_part if b.key not in split) for of_part in found)
    return (tuple(matrices), *others)


def by_block(
    found: Sequence[Sequence[Block]], values: Iterable[tuple[Together, T]]
) -> tuple[tuple[T, ...], ...]:
    """The value of each block, by part, from those of blocks that have one together. Pure."""
    known = {key: value for keys, value in values for key in keys}
    return tuple(tuple(known[block.key] for block in of_part) for of_part in found)


def first_owners(
    found: Sequence[Sequence[Block]],
    given: Sequence[Sequence[Together]],
    candidates: Callable[[Together], tuple[int, ...]],
) -> tuple[tuple[int, ...], ...]:
    """The first owner of every block, by part: each group balanced, split matrices included. Pure.

    Args:
        found: the blocks of each part.
        given: as of `given_together`.
        candidates: the ranks that may own some blocks.
    """
    chosen: list[tuple[Together, int]] = []
    loads: Counter[int] = Counter()
    for group in given:
        first = [found[part][place] for (part, place), *_ in group]
        sizes = [sum(found[part][place].work for part, place in keys) for keys in group]
        heavy = {number for number, block in enumerate(first) if block.weight}
        owners = spread_owners(sizes, [candidates(keys) for keys in group], heavy, loads=loads)
        chosen += zip(group, owners, strict=True)
        if given[0]:
            for size, owner in zip(sizes, owners, strict=True):
                loads[owner] += size
    return by_block(found, chosen)


def update_ends(shares: Iterable[tuple[int, int]]) -> list[int]:
    """Of each block, the position after the last one that is updated with it. Pure.

    Args:
        shares: of each block its elements, and those of what is updated as one: of the block alone,
            or of a matrix, whose blocks follow each other.
    """
    ends: list[int] = []
    filled = 0
    for position, (elements, together) in enumerate(shares):
        filled += elements
        if filled == together:
            ends += [position + 1] * (position + 1 - len(ends))
            filled = 0
    return ends


def matrix_work(rows: int, columns: int) -> int:
    """The work of a matrix that is made orthogonal, in elements that are updated alone. Pure.

    It is that of five Newton-Schulz iterations: two products of the smaller side squared with the
    larger, and one of it cubed.
    """
    small, large = sorted((rows, columns))
    return rows * columns + 5 * (4 * small**2 * large + 2 * small**3) // _ELEMENT_FLOPS


def assign_owners(
    sizes: Sequence[int],
    candidates: Sequence[tuple[int, ...]],
    previous: Sequence[int | None] | None = None,
    *,
    share_of: Callable[[int], float] | None = None,
) -> tuple[int, ...]:
    """The owner of every block: balanced, with as few moves as balance allows.

    Blocks with equal candidates are divided among these. Without `previous`, each candidate gets
    one contiguous run. With it, blocks keep their owners. Orphans (blocks whose owner is None or no
    candidate) go to the least loaded candidates, largest first. Then blocks leave the fullest
    candidates only while one holds more than the largest share and the largest block together.

    Args:
        share_of: with `previous`: how much a candidate gets beside others of its group; None: all
            as much.
    Returns:
        One rank per block. The largest load of a group of candidates is at most the mean load plus
        the group's largest block, where shares are equal.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    known: dict[int, list[int]] = {}  # a tuple of 100,000 ranks is hashed once, not for each block
    for block, group in enumerate(candidates):
        if not group:
            raise ValueError(f"block {block} has no candidate to own it")
        if id(group) not in known:
            known[id(group)] = groups.setdefault(group, [])
        known[id(group)].append(block)
    owners: list[int] = [0] * len(sizes)
    for group, members in groups.items():
        if previous is None:
            chosen = _contiguous([sizes[b] for b in members], group)
        else:
            chosen = _minimal_moves(
                [sizes[b] for b in members],
                group,
                [previous[b] for b in members],
                dict.fromkeys(group, 1.0) if share_of is None else {r: share_of(r) for r in group},
            )
        for block, owner in zip(members, chosen, strict=True):
            owners[block] = owner
    return tuple(owners)


def spread_owners(
    sizes: Sequence[int],
    candidates: Sequence[tuple[int, ...]],
    heavy: Collection[int] = (),
    *,
    loads: Mapping[int, int] | None = None,
) -> tuple[int, ...]:
    """The first owner of every block, so that each layer's blocks lie with all candidates.

    From the last block on, each goes to the candidate that owns the least, so that at any moment of
    a backward pass all of them have gradients to receive. Pure.

    Args:
        sizes: the work of each block.
        heavy: the blocks that are given away first, the largest before the others (longest
            processing time first).
        loads: the work that ranks have already, if any has.
    Returns:
        One rank per block. Without `loads` the largest load of a group of candidates is at most the
        mean load plus the group's largest block.
    """
    before = loads or {}
    heaps: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    known: dict[int, list[tuple[int, int, int]]] = {}  # see assign_owners
    owners = [0] * len(sizes)
    first = sorted(heavy, key=lambda block: (-sizes[block], -block))
    others = (block for block in reversed(range(len(sizes))) if block not in heavy)
    for block in (*first, *others):
        group = candidates[block]
        if not group:
            raise ValueError(f"block {block} has no candidate to own it")
        if id(group) not in known:
            fresh = [(before.get(rank, 0), place, rank) for place, rank in enumerate(group)]
            heapq.heapify(fresh)
            known[id(group)] = heaps.setdefault(group, fresh)
        heap = known[id(group)]
        load, place, owner = heap[0]
        heapq.heapreplace(heap, (load + sizes[block], place, owner))
        owners[block] = owner
    return tuple(owners)


def _contiguous(sizes: Sequence[int], group: tuple[int, ...]) -> list[int]:
    """Each block's candidate: the one with the block's middle in its equal share of the whole."""
    total = sum(sizes)
    chosen, before = [], 0
    for size in sizes:
        middle = 2 * before + size
        place = middle * len(group) // (2 * total) if total else 0
        chosen.append(group[min(place, len(group) - 1)])
        before += size
    return chosen


def _minimal_moves(
    sizes: Sequence[int],
    group: tuple[int, ...],
    previous: Sequence[int | None],
    shares: Mapping[int, float],
) -> list[int]:
    remaining = set(group)
    chosen: list[int | None] = [owner if owner in remaining else None for owner in previous]
    load = dict.fromkeys(group, 0)
    for size, owner in zip(sizes, chosen, strict=True):
        if owner is not None:
            load[owner] += size
    heap = [(amount / shares[owner], owner) for owner, amount in load.items()]
    heapq.heapify(heap)
    orphans = [block for block, owner in enumerate(chosen) if owner is None]
    for block in sorted(orphans, key=lambda b: (-sizes[b], b)):
        _, owner = heapq.heappop(heap)
        chosen[block] = owner
        load[owner] += sizes[block]
        heapq.heappush(heap, (load[owner] / shares[owner], owner))
    result = [owner for owner in chosen if owner is not None]
    _level(sizes, result, load, shares)
    return result


def _level(
    sizes: Sequence[int], chosen: list[int], load: dict[int, int], shares: Mapping[int, float]
) -> None:
    """Move blocks from the fullest to the emptiest while it exceeds the largest share and block.

    One with a smaller share keeps what it has up to that: it came to other blocks without any.
    """
    each, largest = sum(sizes) / sum(shares.values()), max(sizes, default=0)
    most = each * max(shares.values())
    held: dict[int, list[int]] = {owner: [] for owner in load}
    for block, owner in enumerate(chosen):
        held[owner].append(block)
    full = [(-amount, owner) for owner, amount in load.items()]
    empty = [(amount / shares[owner], owner) for owner, amount in load.items()]
    heapq.heapify(full)
    heapq.heapify(empty)
    while full:
        amount, giver = heapq.heappop(full)
        if -amount != load[giver]:
            continue
        if load[giver] <= most + largest:
            return
        while empty[0][0] != load[empty[0][1]] / shares[empty[0][1]]:
            heapq.heappop(empty)
        taker = empty[0][1]
        block = held[giver].pop()
        chosen[block] = taker
        held[taker].append(block)
        load[giver] -= sizes[block]
        load[taker] += sizes[block]
        for owner in (giver, taker):
            heapq.heappush(full, (-load[owner], owner))
            heapq.heappush(empty, (load[owner] / shares[owner], owner))
