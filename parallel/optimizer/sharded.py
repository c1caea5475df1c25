"""AdamW whose state is sharded by whole-row blocks (ZeRO-1): the owner of a block updates it.

Rajbhandari et al. 2020, section 5.1, for what is sharded; blocks and owners come from the plan. One
kernel everywhere (torch's fused AdamW), applied block by block, so that the bits of an update do not
depend on how blocks are shared out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from holdfast import _native
from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.adamw import AdamWSettings, BlockUpdate, Fence, update_blocks
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer, Segment
from holdfast.parallel.optimizer.reduction import (
    OwnedBlock,
    ReductionPlan,
    Span,
    gather_from_owners,
    reduce_to_owners,
    reduction_plan,
)
from holdfast.parallel.plan import Plan
from holdfast.parallel.precision import precision_of


def clipping_factor(gradient_norm: float, clip_norm: float) -> float:
    """What gradients are multiplied by: torch.nn.utils.clip_grad_norm_'s rule; 1.0 when clip_norm is 0."""
    return min(1.0, clip_norm / (gradient_norm + 1e-6)) if clip_norm > 0 else 1.0


def norm_from_squares(squares: Sequence[float]) -> float:
    """The global gradient norm from every block's sum of squares.

    The exact sum, rounded once (math.fsum): independent of the order, hence of who owns what.
    """
    return math.sqrt(math.fsum(squares))


class ShardedAdamW:
    """The optimizer of one rank: reduce, (vote elsewhere), apply, gather.

    Exact-mode safe. `reduce` and `apply` are collective over the ranks that hold a use of a block.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        buffer: ParameterBuffer,
        accumulator: GradientAccumulator,
        world: Communicator,
        tensor: Communicator,
        settings: AdamWSettings,
        *,
        before: ShardedAdamW | None = None,
    ) -> None:
        """Args:
        before: of the plan before; where the same blocks are owned its state is taken over as it is.
        """
        self._rank = rank
        self._tensor_index = plan.stage_replicas.tensor_index(rank)
        self._buffer = buffer
        self._accumulator = accumulator
        self._world = world
        self._tensor = tensor
        self._settings = settings
        self.fence: Fence | None = None
        """Asked before state changes, where somebody copies it meanwhile."""
        self._reduction: ReductionPlan = reduction_plan(plan, rank, buffer)
        self._first_slot = sum(len(blocks) for blocks in plan.blocks[: self._tensor_index])
        self.slots = sum(len(blocks) for blocks in plan.blocks)
        """Number of (tensor index, block) pairs: the length of the squares that `reduce` gives."""
        self._summed_over_copies = tuple(s for s in buffer.segments if s.spec.sum_over_copies)
        self._kept: list[tuple[Span, Tensor]] = []
        """This rank's own sums, where reducing adds others' to them; see `keep_own_sums`."""
        self._is_reduced = False
        self._allocate(before)

    @property
    def owned(self) -> tuple[OwnedBlock, ...]:
        """The blocks whose state this rank keeps."""
        return self._reduction.owned

    def owned_gradients(self) -> Iterator[tuple[OwnedBlock, Tensor]]:
        """This rank's blocks with their reduced gradients (flat), valid between reduce and apply."""
        for block, (start, stop) in zip(self._reduction.owned, self._ranges, strict=True):
            yield block, self._gradients[start:stop]

    def slot(self, block: OwnedBlock) -> int:
        """The place of one of this rank's blocks among all (tensor index, block) pairs."""
        return self._first_slot + block.block.index

    @property
    def step(self) -> int:
        """How many updates have been applied."""
        return int(self._step)

    def _allocate(self, before: ShardedAdamW | None) -> None:
        values = self._buffer.values
        state_dtype = precision_of(values.dtype).state.dtype
        owned = self._reduction.owned
        elements = sum(block.block.elements for block in owned)
        self._step = torch.zeros((), dtype=torch.float32, device=values.device)
        self._master: Tensor | None = None
        same = before is not None and before._buffer is self._buffer and before.owned == owned
        if same:
            assert before is not None
            self._step.copy_(before._step)
            self._gradients, self._master = before._gradients, before._master
            self._exp_avg, self._exp_avg_sq = before._exp_avg, before._exp_avg_sq
        else:
            self._gradients = torch.zeros(elements, dtype=state_dtype, device=values.device)
            self._exp_avg = torch.zeros_like(self._gradients)
            self._exp_avg_sq = torch.zeros_like(self._gradients)
            if values.dtype != state_dtype:
                self._master = torch.empty_like(self._gradients)
        self._ranges: list[tuple[int, int]] = []
        self._updates: list[BlockUpdate] = []
        start = 0
        for block in owned:
            stop = start + block.block.elements
            self._ranges.append((start, stop))
            source = values[block.start : block.stop]
            if self._master is not None:
                if not same:
                    self._master[start:stop].copy_(source)
                source = self._master[start:stop]
            self._updates.append(
                BlockUpdate(
                    source,
                    self._gradients[start:stop],
                    self._exp_avg[start:stop],
                    self._exp_avg_sq[start:stop],
                    block.segment.spec.decay,
                )
            )
            start = stop

    @property
    def state(self) -> dict[str, Tensor]:
        """This rank's state by kind, flat, in the order of `owned`: exp_avg, exp_avg_sq and, where the
        parameters have fewer bits, master. Live memory: see `fence`."""
        found = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        return found if self._master is None else {"master": self._master, **found}

    def restore(self, step: int) -> None:
        """Go on from `step` updates, once parameters and `state` have been filled. Local."""
        self._step.fill_(step)

    def restart(self) -> None:
        """Begin anew from the parameters as they are now: no moments, no updates. Local."""
        self._step.zero_()
        self._exp_avg.zero_()
        self._exp_avg_sq.zero_()
        if self._master is not None:
            for block, (start, stop) in zip(self._reduction.owned, self._ranges, strict=True):
                self._master[start:stop].copy_(self._buffer.values[block.start : block.stop])

    def keep_own_sums(self) -> None:
        """From now on copy what `reduce` is about to change, so that `restore_own_sums` can undo it.

        Costs memory and a copy of the size of the owned blocks' sums, and of tensor-parallel copies' sums.
        """
        spans = [Span(block.start, block.stop) for block in self._reduction.owned]
        spans += [first for first, _ in self._reduction.tied]
        spans += [Span(s.offset, s.offset + s.spec.elements) for s in self._summed_over_copies]
        joined: list[Span] = []
        for span in sorted(set(spans), key=lambda r: r.start):
            if joined and span.start <= joined[-1].stop:
                joined[-1] = Span(joined[-1].start, max(span.stop, joined[-1].stop))
            else:
                joined.append(span)
        sums = self._accumulator.sums
        self._kept = [(span, torch.empty_like(sums[span.start : span.stop])) for span in joined]

    def begin_step(self) -> None:
        """Sums are being added anew: there is no `reduce` to undo. Local."""
        self._is_reduced = False

    def restore_own_sums(self) -> None:
        """Undo a `reduce` that was interrupted: the sums are this rank's own again. Local."""
        if self._is_reduced:
            for span, own in self._kept:
                self._accumulator.sums[span.start : span.stop].copy_(own)
        self._is_reduced = False

    def reduce(self) -> tuple[Tensor, int]:
        """Bring every owned block's complete gradient here.

        Returns:
            squares: float64[slots] on CPU: each counted block's sum of squares in its slot if this
                rank owns it, zero elsewhere, so that a sum over ranks gives all slots.
            flags: NONFINITE | OUT_OF_RANGE as seen by this rank.
        """
        accumulator = self._accumulator
        for span, own in self._kept:
            own.copy_(accumulator.sums[span.start : span.stop])
        self._is_reduced = True
        flags = accumulator.finish()
        flags |= self._sum_over_tensor_copies()
        flags |= reduce_to_owners(self._reduction, accumulator, self._rank, self._world)
        squares = torch.zeros(self.slots, dtype=torch.float64)
        for block, (start, stop) in zip(self._reduction.owned, self._ranges, strict=True):
            square = self._converted(block, self._gradients[start:stop])
            if block.segment.spec.counts_in_norm(self._tensor_index):
                squares[self.slot(block)] = square
        return squares, flags

    def _converted(self, block: OwnedBlock, gradient: Tensor) -> float:
        sums = self._accumulator.sums[block.start : block.stop]
        bits = self._accumulator.fraction_bits
        double = gradient.dtype == torch.float64
        if gradient.device.type != "cpu":
            if self._accumulator.exact:
                torch.mul(sums.double(), 2.0**-bits, out=gradient)
            else:
                gradient.copy_(sums)
            return float(gradient.double().square().sum())
        pointers = (sums.data_ptr(), gradient.data_ptr(), gradient.numel())
        if self._accumulator.exact:
            convert = _native.reduce_convert_f64 if double else _native.reduce_convert_f32
            return convert(*pointers, bits)
        gradient.copy_(sums)
        squares = _native.sum_squares_f64 if double else _native.sum_squares_f32
        return squares(gradient.data_ptr(), gradient.numel())

    def _sum_over_tensor_copies(self) -> int:
        """Add the partial gradients of tensor-parallel copies, in member order: equal on each copy."""
        segments = self._summed_over_copies
        if not segments or self._tensor.size == 1:
            return 0
        sums = self._accumulator.sums
        mine = torch.cat([self._buffer.view(sums, s).reshape(-1) for s in segments])
        parts = [torch.empty_like(mine) for _ in range(self._tensor.size)]
        self._tensor.all_gather(parts, mine).wait()
        flags, start = 0, 0
        for segment in segments:
            stop = start + segment.spec.elements
            flags |= self._sum_copies(segment, [part[start:stop] for part in parts])
            start = stop
        return flags

    def _sum_copies(self, segment: Segment, parts: Sequence[Tensor]) -> int:
        copies = [parts[index] for index in segment.spec.tensor_copies]
        total = copies[0].clone()
        flags = 0
        for part in copies[1:]:
            flags |= self._accumulator.add_to(total, part)
        self._buffer.view(self._accumulator.sums, segment).copy_(total.view(segment.spec.box.shape))
        return flags

    @property
    def gradients(self) -> Tensor:
        """The owned blocks' reduced gradients, flat, in the order of `owned`; see `owned_gradients`."""
        return self._gradients

    def block_state(self, number: int) -> dict[str, Tensor]:
        """One owned block's live state by kind (`shadows.STATE_KINDS`), flat."""
        update = self._updates[number]
        return {
            "master": update.master,
            "exp_avg": update.exp_avg,
            "exp_avg_sq": update.exp_avg_sq,
        }

    def apply(self, lr: float, factor: float) -> None:
        """Update the owned blocks with their gradients times `factor`, then gather all parameters.

        Called only after the vote: every rank that calls it can finish.
        """
        self.update(lr, factor)
        self.gather()

    def update(self, lr: float, factor: float) -> None:
        """Update the owned blocks. Local."""
        if factor != 1.0:
            self._gradients.mul_(factor)
        self._step += 1
        count = len(self._updates)
        position = 0
        while position < count:
            free = count if self.fence is None else min(count, self.fence(position) + 1)
            update_blocks(self._updates[position:free], self._step, lr, self._settings)
            position = free
        self.round_masters()
        if self.fence is not None:
            self.fence(count)

    def round_masters(self) -> None:
        """Write the parameters of the owned blocks from their master copies, where there are any. Local."""
        if self._master is not None:
            for block, (start, stop) in zip(self._reduction.owned, self._ranges, strict=True):
                self._buffer.values[block.start : block.stop].copy_(self._master[start:stop])

    def gather(self) -> None:
        """Bring every block's parameters from its owner to all who hold it. Collective over these."""
        gather_from_owners(self._reduction, self._buffer.values, self._rank, self._world)
