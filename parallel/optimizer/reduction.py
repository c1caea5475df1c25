"""How each block's gradient reaches its owner and its new value comes back: runs of flat buffers.

Both directions are pairwise messages between the ranks that hold a use of the block. A run is a
stretch of blocks that lie side by side in the buffers of sender and receiver alike, so it travels
without packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator, Handle
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer, Segment
from holdfast.parallel.plan import Block, Plan

_REDUCE_TAG = 1 << 28
_GATHER_TAG = 1 << 29
LONGEST_RUN_ELEMENTS = 1 << 22
"""Runs are cut here, so that a receiver adds one part while the next one arrives."""


@dataclass(frozen=True, slots=True)
class Run:
    """A half-open range of a rank's flat buffers."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class OwnedBlock:
    """A block this rank owns, and where its values lie in the rank's flat buffers."""

    block: Block
    segment: Segment
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.block.elements


@dataclass(frozen=True, slots=True)
class Routes:
    """What one rank owns and exchanges; the same runs serve gradients (in) and values (out)."""

    owned: tuple[OwnedBlock, ...]
    contributed: Mapping[int, tuple[Run, ...]]
    """Owner rank -> runs of mine that it owns."""
    collected: Mapping[int, tuple[Run, ...]]
    """Contributor rank -> runs of what I own that it holds too."""
    folded: tuple[tuple[Run, Run], ...]
    """(first use, second use) of tied weights that lie on this rank both."""


def build_routes(plan: Plan, rank: int, buffer: ParameterBuffer) -> Routes:
    """Where this rank's blocks go to and come from. Pure given the plan; equal on both ends.

    Blocks of the same use lie in the same order on every rank of a stage, so neighbours join into
    one run; a tied weight's second use lies elsewhere in its stage and travels block by block.
    """
    tensor_index = plan.stage_replicas.tensor_index(rank)
    owners = plan.owners[tensor_index]
    first_use = {(s.layer, s.spec_index): s for s in buffer.segments if s.spec.tied_use == 0}
    second_use = {s.spec.name: s for s in buffer.segments if s.spec.tied_use == 1}
    owned: list[OwnedBlock] = []
    contributed: dict[int, list[tuple[Run, bool]]] = {}
    collected: dict[int, list[tuple[Run, bool]]] = {}
    folded: list[tuple[Run, Run]] = []
    tied_names = _tied_names(plan, tensor_index)
    for block in plan.blocks[tensor_index]:
        first = first_use.get((block.layer, block.spec_index))
        name = tied_names.get((block.layer, block.spec_index))
        second = second_use.get(name) if name is not None else None
        if first is None and second is None:
            continue
        run = _run_of(block, first) if first is not None else None
        if second is not None:
            second_run = _run_of(block, second)
            if run is None:
                contributed.setdefault(owners[block.index], []).append((second_run, False))
                continue
            folded.append((run, second_run))
        assert first is not None
        assert run is not None
        if owners[block.index] != rank:
            contributed.setdefault(owners[block.index], []).append((run, True))
            continue
        owned.append(OwnedBlock(block, first, run.start))
        first_holders = set(plan.holders_of_layer(tensor_index, block.layer))
        for peer in plan.contributors(tensor_index, block):
            if peer != rank:
                collected.setdefault(peer, []).append((run, peer in first_holders))
    return Routes(
        owned=tuple(owned),
        contributed={peer: _joined(runs) for peer, runs in sorted(contributed.items())},
        collected={peer: _joined(runs) for peer, runs in sorted(collected.items())},
        folded=tuple(folded),
    )


def _tied_names(plan: Plan, tensor_index: int) -> dict[tuple[int, int], str]:
    names = {
        spec.name
        for layer in plan.layers
        for spec in layer.parameters[tensor_index]
        if spec.tied_use
    }
    return {
        (layer_index, spec_index): spec.name
        for layer_index, layer in enumerate(plan.layers)
        for spec_index, spec in enumerate(layer.parameters[tensor_index])
        if spec.tied_use == 0 and spec.name in names
    }


def _run_of(block: Block, segment: Segment) -> Run:
    start = segment.offset + block.row_start * segment.spec.row_elements
    return Run(start, start + block.elements)


def _joined(runs: Sequence[tuple[Run, bool]]) -> tuple[Run, ...]:
    """Neighbours that may join become one run, cut at `LONGEST_RUN_ELEMENTS`."""
    joined: list[tuple[Run, bool]] = []
    for run, may_join in runs:
        if joined and may_join and joined[-1][1] and joined[-1][0].stop == run.start:
            joined[-1] = (Run(joined[-1][0].start, run.stop), True)
        else:
            joined.append((run, may_join))
    return tuple(piece for run, _ in joined for piece in _pieces(run))


def _pieces(run: Run) -> Iterator[Run]:
    for start in range(run.start, run.stop, LONGEST_RUN_ELEMENTS):
        yield Run(start, min(run.stop, start + LONGEST_RUN_ELEMENTS))


def _from_next(peers: Mapping[int, tuple[Run, ...]], rank: int) -> list[int]:
    """Peers in cyclic order from this rank on, so that not everybody sends to one rank at first."""
    return sorted(peers, key=lambda peer: (peer <= rank, peer))


def reduce_to_owners(
    routes: Routes, accumulator: GradientAccumulator, rank: int, comm: Communicator
) -> int:
    """Add every contributor's sums into the owner's. Collective over all contributors.

    Afterwards `accumulator.sums` holds complete sums for the blocks this rank owns.

    Returns:
        Flags raised while adding (integer overflow).
    """
    sums = accumulator.sums
    flags = 0
    for first, second in routes.folded:
        flags |= accumulator.add_to(
            sums[first.start : first.stop], sums[second.start : second.stop]
        )
    sends = [
        comm.send(sums[run.start : run.stop], peer, _REDUCE_TAG + number)
        for peer in _from_next(routes.contributed, rank)
        for number, run in enumerate(routes.contributed[peer])
    ]
    arrivals = [
        (peer, _REDUCE_TAG + number, run)
        for peer in reversed(_from_next(routes.collected, rank))
        for number, run in enumerate(routes.collected[peer])
    ]
    longest = max((run.stop - run.start for _, _, run in arrivals), default=0)
    buffers = [torch.empty(longest, dtype=sums.dtype, device=sums.device) for _ in range(2)]

    def post(position: int) -> tuple[Handle, Tensor]:
        peer, tag, run = arrivals[position]
        part = buffers[position % 2][: run.stop - run.start]
        return comm.receive(part, peer, tag), part

    posted = post(0) if arrivals else None
    for position, (_, _, run) in enumerate(arrivals):
        assert posted is not None
        handle, part = posted
        posted = post(position + 1) if position + 1 < len(arrivals) else None
        handle.wait()
        flags |= accumulator.add_to(sums[run.start : run.stop], part)
    for send in sends:
        send.wait()
    return flags


def gather_from_owners(routes: Routes, values: Tensor, rank: int, comm: Communicator) -> None:
    """Bring every block's new value from its owner to all who hold it. Collective over holders."""
    receives = [
        comm.receive(values[run.start : run.stop], peer, _GATHER_TAG + number)
        for peer in reversed(_from_next(routes.contributed, rank))
        for number, run in enumerate(routes.contributed[peer])
    ]
    sends = [
        comm.send(values[run.start : run.stop], peer, _GATHER_TAG + number)
        for peer in _from_next(routes.collected, rank)
        for number, run in enumerate(routes.collected[peer])
    ]
    for handle in (*receives, *sends):
        handle.wait()
    for first, second in routes.folded:
        values[second.start : second.stop].copy_(values[first.start : first.stop])
