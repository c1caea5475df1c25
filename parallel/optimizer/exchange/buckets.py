"""Buckets: runs of one owner's blocks that travel as one message.

Every rank cuts the blocks of every owner alike, so that messages need no description. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from holdfast.parallel.layout import ParameterSpec
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer, Segment
from holdfast.parallel.optimizer.spans import Span, joined
from holdfast.parallel.plan import (
    Block,
    BlockKey,
    KeptKind,
    Plan,
    all_keepers,
    is_apart,
    keepers,
    shards,
)


@dataclass(frozen=True, slots=True)
class OwnedBlock:
    """A block that this rank owns, at elements [start, stop) of its flat index space."""

    block: Block
    spec: ParameterSpec
    """The row of its segment."""
    start: int
    is_guest: bool = False
    """Whether the rank holds other parts only: the place follows those of what it holds."""

    @property
    def key(self) -> BlockKey:
        return self.block.key

    @property
    def stop(self) -> int:
        return self.start + self.block.elements


@dataclass(frozen=True, slots=True)
class Bucket:
    """A run of an owner's blocks, as one rank that holds a use of them sees it."""

    owner: int
    row: int
    """The number among the owner's buckets, deepest layers first: the number of its messages."""
    blocks: tuple[Block, ...]
    """In the order of the plan."""
    first: tuple[Span, ...]
    """The places of the blocks here, at the weights' first use; empty if another stage has it."""
    second: tuple[Span, ...]
    """The places at the second use of a tied weight; empty if there is none here."""
    parameters: frozenset[nn.Parameter]
    """The local parameters that the places belong to."""

    @property
    def elements(self) -> int:
        return sum(block.elements for block in self.blocks)

    @property
    def uses(self) -> tuple[tuple[Span, ...], ...]:
        """The places of each use that is here, the first one first."""
        return tuple(spans for spans in (self.first, self.second) if spans)


@dataclass(frozen=True, slots=True)
class OwnedBucket:
    """A bucket of this rank's own blocks."""

    bucket: Bucket
    begin: int
    """The position of its first block among the owned blocks."""
    start: int
    """The first element in the flat state of the owned blocks."""
    contributors: tuple[int, ...]
    """The other ranks that keep a use, in the order in which their sums are added."""
    is_guest: bool = False
    """Whether this rank keeps none."""

    @property
    def end(self) -> int:
        """The position after its last block."""
        return self.begin + len(self.bucket.blocks)


@dataclass(frozen=True, slots=True)
class Routes:
    """The blocks that one rank owns, and the buckets that it exchanges.

    Gradients travel towards owners, parameters from owners, in the same buckets; where replicas
    share gradients and keep parameters whole, other ranks have their part in them.
    """

    owned: tuple[OwnedBlock, ...]
    """In the order of the plan."""
    mine: tuple[OwnedBucket, ...]
    """The buckets of the owned blocks, by row."""
    others: tuple[Bucket, ...]
    """The other owners' buckets with a use kept here, in the order in which they are sent."""


def routes(
    plan: Plan, rank: int, buffer: ParameterBuffer, bucket_elements: int, kept: KeptKind
) -> Routes:
    """The routes of one rank's sums and parameters. Pure; the two ends of a message agree.

    Messages have one order on all ranks: by row, then by the distance from sender to owner. The
    first message that is not done is therefore the next one at both of its ends, so that no rank
    waits in a circle, and not all ranks send to one at first.

    Args:
        bucket_elements: the size up to which neighbouring blocks are joined, equal on all ranks.
        kept: what travels. Only the keepers of a block take part.
    """
    places = _Places(plan, rank, buffer, kept)
    size = 1 + max(plan.stage_replicas.ranks, default=0)
    owned = tuple(
        OwnedBlock(block, plan.spec_of(block), places.first[key].start, key in places.guests)
        for key in plan.owned_blocks(rank)
        for block in (plan.block(key),)
    )
    held = {plan.owner(key) for key in (*places.first, *places.second)}
    others = [
        bucket
        for owner in sorted(held - {rank})
        for bucket in places.buckets(owner, bucket_elements)
        if bucket.first or bucket.second
    ]
    others.sort(key=lambda bucket: (bucket.row, (bucket.owner - rank) % size))
    mine, end, stop = [], len(owned), sum(block.block.elements for block in owned)
    for bucket in places.buckets(rank, bucket_elements) if owned else ():
        end, stop = end - len(bucket.blocks), stop - bucket.elements
        contributors = set(all_keepers(plan, bucket.blocks[0], kept)) - {rank}
        ordered = sorted(contributors, key=lambda peer: (rank - peer) % size)
        is_guest = bucket.blocks[0].key in places.guests
        mine.append(OwnedBucket(bucket, end, stop, tuple(ordered), is_guest))
    return Routes(owned, tuple(mine), tuple(others))


def update_runs(found: Routes, ends: Sequence[int]) -> list[list[OwnedBucket]]:
    """The owned buckets in the order of their update; those with boxes of a matrix together. Pure.

    Args:
        ends: of each owned block, the position after the last one that is updated with it.
    """
    runs: list[list[OwnedBucket]] = []
    for owned in reversed(found.mine):
        if runs and ends[owned.begin - 1] > owned.begin:
            runs[-1].append(owned)
        else:
            runs.append([owned])
    return runs


class _Places:
    """The places of the blocks that one rank keeps, and the buckets of any owner. Pure."""

    def __init__(self, plan: Plan, rank: int, buffer: ParameterBuffer, kept: KeptKind) -> None:
        self._plan = plan
        self.first: dict[BlockKey, Span] = {}
        """The place of each block with a first use kept here, and of guests."""
        self.second: dict[BlockKey, Span] = {}
        """The place of each block with the second use of a tied weight kept here."""
        self._segments: dict[BlockKey, Segment] = {}
        self._second_segments: dict[BlockKey, Segment] = {}
        for segment, block in placed_blocks(plan, buffer.segments):
            if rank in keepers(plan, block, kept, segment.layer):
                second = segment.spec.tied_use
                (self.second if second else self.first)[block.key] = span_of(block, segment)
                (self._second_segments if second else self._segments)[block.key] = segment
        self.guests = dict.fromkeys(k for k in plan.owned_blocks(rank) if plan.is_guest(k))
        """The blocks that the rank owns and does not keep; they have places after all others."""
        end = buffer.elements
        for key in self.guests:
            self.first[key] = Span(end, end := end + plan.block(key).elements)

    def buckets(self, owner: int, elements: int) -> list[Bucket]:
        """All buckets of an owner, by row."""
        found = block_runs(self._plan, owner, elements)
        return [self._bucket(owner, row, blocks) for row, blocks in enumerate(found)]

    def _bucket(self, owner: int, row: int, blocks: Sequence[Block]) -> Bucket:
        first = [self.first[block.key] for block in blocks if block.key in self.first]
        second = [self.second[block.key] for block in blocks if block.key in self.second]
        parameters = {
            segments[block.key].parameter
            for segments in (self._segments, self._second_segments)
            for block in blocks
            if block.key in segments
        }
        return Bucket(
            owner, row, tuple(blocks), joined(first), joined(second), frozenset(parameters)
        )


_LONG = 1 << 17
"""Elements from which on a block is a message of its own, unless its neighbour follows it in
memory: several places mean a copy at both ends, which costs more than a further message."""


def block_runs(plan: Plan, owner: int, elements: int) -> list[tuple[Block, ...]]:
    """The blocks of each of an owner's buckets, by row: runs of neighbours with the same holders.

    They follow each other in memory, or are short. Pure.

    Args:
        elements: the size up to which blocks are joined.
    """
    keys = plan.owned_blocks(owner)
    runs: list[list[Block]] = []
    sizes: list[int] = []
    holders: object = None
    for key in reversed(keys):
        block = plan.block(key)
        spec, stage = plan.spec_of(block), plan.stage_of_layer(block.layer)
        tied = plan.tied_layers(block)
        apart = shards(plan, "gradients") and is_apart(plan, block, "gradients")
        hosts = plan.holders(block) if spec.expert is not None else None
        same = holders == (holders := (stage, spec.copies, spec.summed, tied, apart, hosts))
        before = runs[-1][-1] if runs else block
        near = _follows(block, before) or max(block.elements, before.elements) < _LONG
        if runs and same and near and sizes[-1] + block.elements <= elements:
            runs[-1].append(block)
            sizes[-1] += block.elements
        else:
            runs.append([block])
            sizes.append(block.elements)
    return [tuple(reversed(run)) for run in runs]


def _follows(block: Block, following: Block) -> bool:
    """Whether two blocks are neighbours in one segment."""
    return (block.part, block.layer, block.spec_index, block.row_stop) == (
        following.part,
        following.layer,
        following.spec_index,
        following.row_start,
    )


def placed_blocks(plan: Plan, segments: Iterable[Segment]) -> Iterator[tuple[Segment, Block]]:
    """Each block with each of a rank's segments that uses it. Pure."""
    for segment in segments:
        for block in plan.blocks_of(segment.layer, segment.row.part, segment.row.index):
            yield segment, block


def span_of(block: Block, segment: Segment) -> Span:
    """The place of a block in the flat index space, at the use that is `segment`. Pure."""
    start = segment.offset + block.row_start * segment.spec.row_elements
    return Span(start, start + block.elements)


@dataclass(frozen=True, slots=True)
class Gathering:
    """The messages that bring updated parameters from their owners to the other holders.

    A follower that applies each update to its own copy of a block is left out.
    """

    sends: Mapping[int, tuple[tuple[int, tuple[Span, ...]], ...]]
    """Row of an owned bucket -> (holder, places here of the blocks that it gets)."""
    receives: tuple[tuple[Bucket, tuple[tuple[Span, ...], ...]], ...]
    """Another owner's bucket -> for each use here, the places of the blocks that arrive; in the
    order of first use."""
    copies: tuple[tuple[Span, Span], ...]
    """(first, second) use of tied weights that this rank owns."""
    updated_here: Mapping[BlockKey, tuple[Span, ...]]
    """Another owner's block that this rank updates itself -> its places."""


def gathering(
    found: Routes, rank: int, updates_itself: Callable[[BlockKey, int], bool]
) -> Gathering:
    """The gathering of parameters for one rank. Pure; the two ends of a message agree.

    Args:
        updates_itself: (block, rank) -> whether the rank applies the block's updates to a copy of
            its own, and so gets no parameters from the owner.
    """

    def lacks(bucket: Bucket, holder: int) -> list[bool]:
        return [not updates_itself(block.key, holder) for block in bucket.blocks]

    def chosen(bucket: Bucket, use: Sequence[Span], wanted: Sequence[bool]) -> tuple[Span, ...]:
        return joined(itertools.compress(_spans_of_blocks(bucket, use), wanted))

    sends = {}
    for owned in found.mine:
        wanted = [
            (peer, chosen(owned.bucket, owned.bucket.first, lacks(owned.bucket, peer)))
            for peer in owned.contributors
        ]
        sends[owned.bucket.row] = tuple((peer, places) for peer, places in wanted if places)
    receives, updated_here = [], {}
    for bucket in reversed(found.others):
        lacking = lacks(bucket, rank)
        uses = [_spans_of_blocks(bucket, use) for use in bucket.uses]
        if any(lacking):
            receives.append((bucket, tuple(chosen(bucket, use, lacking) for use in bucket.uses)))
        for number, (block, lack) in enumerate(zip(bucket.blocks, lacking, strict=True)):
            if not lack:
                updated_here[block.key] = tuple(spans[number] for spans in uses)
    copies = [
        pair
        for owned in found.mine
        if owned.bucket.second
        for pair in zip(
            _spans_of_blocks(owned.bucket, owned.bucket.first),
            _spans_of_blocks(owned.bucket, owned.bucket.second),
            strict=True,
        )
    ]
    return Gathering(sends, tuple(receives), tuple(copies), updated_here)


def _spans_of_blocks(bucket: Bucket, spans: Sequence[Span]) -> list[Span]:
    """The place of each block of a bucket, cut from the joined places of all."""
    places: list[Span] = []
    left = list(spans)
    for block in bucket.blocks:
        span = left[0]
        place = Span(span.start, span.start + block.elements)
        places.append(place)
        left[:1] = [Span(place.stop, span.stop)] if place.stop < span.stop else []
    return places
