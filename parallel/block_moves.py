"""Live optimizer state from rank to rank: who sends which block to whom, and the sending.

What moves follows from `transfers`; each message carries its CRC-32C, so that nothing is taken in that is
not what its source holds. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast import _native
from holdfast.parallel.comm import Communicator, Handle
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.layout import Box, Holder, Layout, transfers
from holdfast.parallel.plan import Plan
from holdfast.parallel.shadows import STATE_KINDS, BlockKey

_MOVE_TAG = 5 << 26
_MESSAGE_ELEMENTS = 1 << 20
_WINDOW = 4
"""Messages under way at once, each way."""

Holdings = Mapping[int, Collection[BlockKey]]
"""Rank -> the blocks whose state it has."""
BlockState = Mapping[str, Tensor]
"""A block's tensors by kind, flat."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Blocks that travel from one rank to another in one message."""

    source: int
    target: int
    keys: tuple[BlockKey, ...]
    sizes: tuple[int, ...]
    """Elements of each block, in one kind of state."""


def held_blocks(plan: Plan, ranks: Iterable[int]) -> dict[int, set[BlockKey]]:
    """What ranks hold under a plan, as owners and as shadows. Pure."""
    found: dict[int, set[BlockKey]] = {rank: set(plan.owned_places(rank)) for rank in ranks}
    for index, shadows in enumerate(plan.shadows):
        for place, holders in enumerate(shadows):
            for rank in holders:
                if rank in found:
                    found[rank].add((index, place))
    return found


def missing_blocks(plan: Plan, held: Holdings) -> list[BlockKey]:
    """Blocks that nobody holds any more. Pure."""
    known: set[BlockKey] = set().union(*held.values())
    return [
        (index, place)
        for index, blocks in enumerate(plan.blocks)
        for place in range(len(blocks))
        if (index, place) not in known
    ]


def plan_parcels(
    plan: Plan, held: Holdings, needed: Holdings, node_of: Mapping[int, str]
) -> list[Parcel]:
    """The messages that give every rank the blocks it needs. Pure; equal on every rank.

    Args:
        plan: for the blocks' sizes; these are the same in every generation.
    Raises:
        LayoutError: a block that nobody holds.
    """
    wanted = {rank: set(keys) - set(held.get(rank, ())) for rank, keys in needed.items()}
    asked = set().union(*wanted.values())

    def boxes(keys: Iterable[BlockKey]) -> dict[str, tuple[Box, ...]]:
        return {
            _name(key): (Box((0,), (plan.blocks[key[0]][key[1]].elements,)),)
            for key in sorted(keys)
        }

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
        parcel
        for (source, target), keys in pairs.items()
        for parcel in _cut(plan, source, target, keys)
    ]


def _rank(holder: Holder) -> int:
    assert isinstance(holder, int)
    return holder


def _name(key: BlockKey) -> str:
    return f"{key[0]}/{key[1]}"


def _cut(plan: Plan, source: int, target: int, keys: Sequence[BlockKey]) -> Iterable[Parcel]:
    """Messages of a bounded size, and of one block at least."""
    batch: list[tuple[BlockKey, int]] = []
    for key in keys:
        size = plan.blocks[key[0]][key[1]].elements
        if batch and sum(s for _, s in batch) + size > _MESSAGE_ELEMENTS:
            yield Parcel(source, target, *zip(*batch, strict=True))
            batch = []
        batch.append((key, size))
    if batch:
        yield Parcel(source, target, *zip(*batch, strict=True))


def move_blocks(
    parcels: Sequence[Parcel],
    rank: int,
    comm: Communicator,
    read: Callable[[BlockKey], BlockState],
    write: Callable[[BlockKey, BlockState], None],
    *,
    dtype: torch.dtype,
) -> int:
    """Send and receive this rank's parcels. Collective over their sources and targets.

    Every rank goes through its parcels in the order of the list, so that none waits in a circle.

    Args:
        comm: carries CPU tensors.
        read: a held block's state.
        write: takes in a needed block's state, in CPU memory that is not used again.
    Returns:
        Bytes that this rank has received.
    Raises:
        PeerLost: a peer is gone, or what it sent arrived damaged.
    """
    kinds = len(STATE_KINDS)
    mine = [(n, p) for n, p in enumerate(parcels) if rank in (p.source, p.target)]
    under_way: list[tuple[Parcel, Tensor, Tensor, list[Handle]]] = []
    received = 0

    def finish() -> None:
        nonlocal received
        parcel, content, checksum, handles = under_way.pop(0)
        for handle in handles:
            handle.wait()
        if parcel.target != rank:
            return
        if _checksum(content) != int(checksum):
            raise PeerLost(
                f"optimizer state from rank {parcel.source} arrived damaged: its checksum does not match"
            )
        received += content.numel() * content.element_size()
        start = 0
        for key, size in zip(parcel.keys, parcel.sizes, strict=True):
            parts = content[start : start + kinds * size].view(kinds, size)
            write(key, dict(zip(STATE_KINDS, parts, strict=True)))
            start += kinds * size

    for number, parcel in mine:
        tag = _MOVE_TAG + 2 * number
        if len(under_way) >= _WINDOW:
            finish()
        if parcel.source == rank:
            states = [read(key) for key in parcel.keys]
            content = torch.cat(
                [state[kind].reshape(-1).cpu() for state in states for kind in STATE_KINDS]
            )
            checksum = torch.tensor([_checksum(content)], dtype=torch.int64)
            handles = [
                comm.send(checksum, parcel.target, tag),
                comm.send(content, parcel.target, tag + 1),
            ]
        else:
            content = torch.empty(kinds * sum(parcel.sizes), dtype=dtype)
            checksum = torch.empty(1, dtype=torch.int64)
            handles = [
                comm.receive(checksum, parcel.source, tag),
                comm.receive(content, parcel.source, tag + 1),
            ]
        under_way.append((parcel, content, checksum, handles))
    while under_way:
        finish()
    return received


def _checksum(content: Tensor) -> int:
    return _native.crc32c(content.data_ptr(), content.numel() * content.element_size())
