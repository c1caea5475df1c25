"""Block transfers: which optimizer blocks go from which rank to which, by `layout.transfers`.

Pure; needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from holdfast.parallel.layout import Box, Holder, Layout, transfers
from holdfast.parallel.plan.ownership import BlockKey
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.shadow_placement import Shadows

_MESSAGE_ELEMENTS = 1 << 20

Holdings = Mapping[int, Collection[BlockKey]]
"""Rank -> the blocks whose state it has."""


@dataclass(frozen=True, slots=True)
class BlockTransfer:
    """The blocks that one rank sends to another in one message."""

    source: int
    target: int
    keys: tuple[BlockKey, ...]
    sizes: tuple[int, ...]
    """The number of elements of each block, in one kind of state."""


def held_blocks(plan: Plan, ranks: Iterable[int]) -> dict[int, set[BlockKey]]:
    """The blocks that ranks hold under a plan, as owners and as shadows. Pure."""
    found: dict[int, set[BlockKey]] = {rank: set(plan.owned_blocks(rank)) for rank in ranks}
    _add_followed(found, plan.shadows)
    return found


def incoming_blocks(plan: Plan, ranks: Iterable[int]) -> dict[int, set[BlockKey]]:
    """The blocks that are incoming on ranks under a plan. Pure."""
    found: dict[int, set[BlockKey]] = {rank: set() for rank in ranks}
    _add_followed(found, plan.incoming)
    return found


def _add_followed(found: dict[int, set[BlockKey]], followers: Sequence[Shadows]) -> None:
    for index, blocks in enumerate(followers):
        for place, ranks in enumerate(blocks):
            for rank in ranks:
                if rank in found:
                    found[rank].add((index, place))


def missing_blocks(plan: Plan, held: Holdings) -> list[BlockKey]:
    """The blocks that no rank holds any more. Pure."""
    known: set[BlockKey] = set().union(*held.values())
    return [
        (index, place)
        for index, blocks in enumerate(plan.blocks)
        for place in range(len(blocks))
        if (index, place) not in known
    ]


def plan_block_transfers(
    plan: Plan, held: Holdings, needed: Holdings, node_of: Mapping[int, str]
) -> list[BlockTransfer]:
    """The messages that give every rank the blocks it needs. Pure; equal on every rank.

    Args:
        plan: the plan with the blocks' sizes, which are the same in every generation.
        held: the blocks that ranks have.
        needed: the blocks that ranks must have.
        node_of: the failure domain of each rank.
    Raises:
        LayoutError: no rank holds a block.
    """
    wanted = {rank: set(keys) - set(held.get(rank, ())) for rank, keys in needed.items()}
    asked = set().union(*wanted.values())

    def boxes(keys: Iterable[BlockKey]) -> dict[str, tuple[Box, ...]]:
        return {_name(key): (Box((0,), (plan.block(key).elements,)),) for key in sorted(keys)}

    def cost(source: Holder, target: Holder) -> float:
        return 1.0 if node_of[_rank(source)] == node_of[_rank(target)] else 10.0

    moves = transfers(
        Layout({rank: boxes(asked.intersection(keys)) for rank, keys in sorted(held.items())}),
        Layout({rank: boxes(keys) for rank, keys in sorted(wanted.items())}),
        cost=cost,
    )
    pairs: dict[tuple[int, int], list[BlockKey]] = {}
    for move in moves:
        index, _, place = move.name.partition("/")
        pair = _rank(move.source), _rank(move.target)
        pairs.setdefault(pair, []).append((int(index), int(place)))
    return [
        transfer
        for (source, target), keys in pairs.items()
        for transfer in _cut(plan, source, target, keys)
    ]


def _rank(holder: Holder) -> int:
    assert isinstance(holder, int)
    return holder


def _name(key: BlockKey) -> str:
    return f"{key[0]}/{key[1]}"


def _cut(plan: Plan, source: int, target: int, keys: Sequence[BlockKey]) -> Iterable[BlockTransfer]:
    """The transfers of a bounded size, each of one block at least."""
    batch: list[tuple[BlockKey, int]] = []
    for key in keys:
        size = plan.block(key).elements
        if batch and sum(s for _, s in batch) + size > _MESSAGE_ELEMENTS:
            yield BlockTransfer(source, target, *zip(*batch, strict=True))
            batch = []
        batch.append((key, size))
    if batch:
        yield BlockTransfer(source, target, *zip(*batch, strict=True))
