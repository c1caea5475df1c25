"""The reduction of gradients to their owners and the gather of updated parameters, by spans.

Both are pairwise messages between the ranks that hold a use of the block. A span is a run of blocks
that are neighbours in the buffers of sender and receiver alike, so it travels without packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.parallel.comm import GATHERING, REDUCTION, Communicator, Handle
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer, Segment
from holdfast.parallel.plan import Block, BlockKey, Plan

LONGEST_SPAN_ELEMENTS = 1 << 22
"""The longest span, so that a receiver adds one part while the next one arrives."""


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of a rank's flat buffers."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class OwnedBlock:
    """A block that this rank owns, at elements [start, stop) of its flat buffers."""

    key: BlockKey
    block: Block
    segment: Segment
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.block.elements


@dataclass(frozen=True, slots=True)
class ReductionPlan:
    """The blocks that one rank owns, and the spans that it sends and receives.

    The same spans serve gradients (towards owners) and parameters (from owners).
    """

    owned: tuple[OwnedBlock, ...]
    outgoing: Mapping[int, tuple[Span, ...]]
    """Owner rank -> the spans here of blocks that it owns."""
    incoming: Mapping[int, tuple[Span, ...]]
    """Contributor rank -> the spans here of owned blocks that it holds too."""
    tied: tuple[tuple[Span, Span], ...]
    """(first use, second use) of tied weights with both on this rank."""


def reduction_plan(plan: Plan, rank: int, buffer: ParameterBuffer) -> ReductionPlan:
    """The spans that this rank sends and receives. Pure; equal on both ends.

    Blocks of the same use have the same order on every rank of a stage, so neighbours join into one
    span. A tied weight's second use has another place in its stage and travels block by block.
    """
    shard_index = plan.stage_replicas.shard_index(rank)
    owners = plan.owners[shard_index]
    first_use = {(s.layer, s.spec_index): s for s in buffer.segments if s.spec.tied_use == 0}
    second_use = {s.spec.name: s for s in buffer.segments if s.spec.tied_use == 1}
    owned: list[OwnedBlock] = []
    outgoing: dict[int, list[tuple[Span, bool]]] = {}
    incoming: dict[int, list[tuple[Span, bool]]] = {}
    tied: list[tuple[Span, Span]] = []
    tied_names = _tied_names(plan, shard_index)
    for block in plan.blocks[shard_index]:
        first = first_use.get((block.layer, block.spec_index))
        name = tied_names.get((block.layer, block.spec_index))
        second = second_use.get(name) if name is not None else None
        if first is None and second is None:
            continue
        span = _span_of(block, first) if first is not None else None
        if second is not None:
            second_span = _span_of(block, second)
            if span is None:
                outgoing.setdefault(owners[block.index], []).append((second_span, False))
                continue
            tied.append((span, second_span))
        assert first is not None
        assert span is not None
        if owners[block.index] != rank:
            outgoing.setdefault(owners[block.index], []).append((span, True))
            continue
        owned.append(OwnedBlock((shard_index, block.index), block, first, span.start))
        first_holders = set(plan.holders_of_layer(shard_index, block.layer))
        for peer in plan.contributors(shard_index, block):
            if peer != rank:
                incoming.setdefault(peer, []).append((span, peer in first_holders))
    return ReductionPlan(
        owned=tuple(owned),
        outgoing={peer: _joined(spans) for peer, spans in sorted(outgoing.items())},
        incoming={peer: _joined(spans) for peer, spans in sorted(incoming.items())},
        tied=tuple(tied),
    )


def _tied_names(plan: Plan, shard_index: int) -> dict[tuple[int, int], str]:
    names = {
        spec.name
        for layer in plan.layers
        for spec in layer.parameters[shard_index]
        if spec.tied_use
    }
    return {
        (layer_index, spec_index): spec.name
        for layer_index, layer in enumerate(plan.layers)
        for spec_index, spec in enumerate(layer.parameters[shard_index])
        if spec.tied_use == 0 and spec.name in names
    }


def _span_of(block: Block, segment: Segment) -> Span:
    start = segment.offset + block.row_start * segment.spec.row_elements
    return Span(start, start + block.elements)


def _joined(spans: Sequence[tuple[Span, bool]]) -> tuple[Span, ...]:
    """Neighbouring spans joined where that is allowed, cut at `LONGEST_SPAN_ELEMENTS`."""
    joined: list[tuple[Span, bool]] = []
    for span, may_join in spans:
        if joined and may_join and joined[-1][1] and joined[-1][0].stop == span.start:
            joined[-1] = (Span(joined[-1][0].start, span.stop), True)
        else:
            joined.append((span, may_join))
    return tuple(piece for span, _ in joined for piece in _pieces(span))


def _pieces(span: Span) -> Iterator[Span]:
    for start in range(span.start, span.stop, LONGEST_SPAN_ELEMENTS):
        yield Span(start, min(span.stop, start + LONGEST_SPAN_ELEMENTS))


def _from_next(peers: Mapping[int, tuple[Span, ...]], rank: int) -> list[int]:
    """The peers in cyclic order from this rank on, so that not all ranks send to one at first."""
    return sorted(peers, key=lambda peer: (peer <= rank, peer))


def summed_segments(buffer: ParameterBuffer) -> tuple[Segment, ...]:
    """The segments whose copies see a part of the gradient each. Pure."""
    return tuple(segment for segment in buffer.segments if segment.spec.summed)


def sum_over_copies(
    buffer: ParameterBuffer, accumulator: GradientAccumulator, shards: Communicator
) -> int:
    """Add the partial gradients of a stage replica's copies, in member order: equal on each copy.

    Collective over `shards`, the ranks of the stage replica.

    Returns:
        Flags raised while adding (integer overflow).
    """
    segments = summed_segments(buffer) if shards.size > 1 else ()
    if not segments:
        return 0
    sums = accumulator.sums
    mine = torch.cat([buffer.view(sums, segment).reshape(-1) for segment in segments])
    parts = [torch.empty_like(mine) for _ in range(shards.size)]
    shards.all_gather(parts, mine).wait()
    flags, start = 0, 0
    for segment in segments:
        stop = start + segment.spec.elements
        summed = [parts[index][start:stop] for index in segment.spec.summed]
        total = summed[0].clone()
        for part in summed[1:]:
            flags |= accumulator.add_to(total, part)
        buffer.view(sums, segment).copy_(total.view(segment.spec.box.shape))
        start = stop
    return flags


def reduce_to_owners(
    reduction: ReductionPlan, accumulator: GradientAccumulator, rank: int, comm: Communicator
) -> int:
    """Add every contributor's sums into the owner's. Collective over all contributors.

    Afterwards `accumulator.sums` holds complete sums for the blocks that this rank owns.

    Returns:
        Flags raised while adding (integer overflow).
    """
    sums = accumulator.sums
    flags = 0
    for first, second in reduction.tied:
        flags |= accumulator.add_to(
            sums[first.start : first.stop], sums[second.start : second.stop]
        )
    sends = [
        comm.send(sums[span.start : span.stop], peer, REDUCTION.tag(number))
        for peer in _from_next(reduction.outgoing, rank)
        for number, span in enumerate(reduction.outgoing[peer])
    ]
    arrivals = [
        (peer, REDUCTION.tag(number), span)
        for peer in reversed(_from_next(reduction.incoming, rank))
        for number, span in enumerate(reduction.incoming[peer])
    ]
    longest = max((span.stop - span.start for _, _, span in arrivals), default=0)
    buffers = [torch.empty(longest, dtype=sums.dtype, device=sums.device) for _ in range(2)]

    def post(position: int) -> tuple[Handle, Tensor]:
        peer, tag, span = arrivals[position]
        part = buffers[position % 2][: span.stop - span.start]
        return comm.receive(part, peer, tag), part

    posted = post(0) if arrivals else None
    for position, (_, _, span) in enumerate(arrivals):
        assert posted is not None
        handle, part = posted
        posted = post(position + 1) if position + 1 < len(arrivals) else None
        handle.wait()
        flags |= accumulator.add_to(sums[span.start : span.stop], part)
    for send in sends:
        send.wait()
    return flags


def gather_from_owners(
    reduction: ReductionPlan, values: Tensor, rank: int, comm: Communicator
) -> None:
    """Send every block's new parameters from its owner to its holders. Collective over these."""
    receives = [
        comm.receive(values[span.start : span.stop], peer, GATHERING.tag(number))
        for peer in reversed(_from_next(reduction.outgoing, rank))
        for number, span in enumerate(reduction.outgoing[peer])
    ]
    sends = [
        comm.send(values[span.start : span.stop], peer, GATHERING.tag(number))
        for peer in _from_next(reduction.incoming, rank)
        for number, span in enumerate(reduction.incoming[peer])
    ]
    for handle in (*receives, *sends):
        handle.wait()
    for first, second in reduction.tied:
        values[second.start : second.stop].copy_(values[first.start : first.stop])
