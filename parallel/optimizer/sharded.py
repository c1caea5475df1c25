"""The sharded optimizer (ZeRO-1): state in whole-row blocks, each updated by its owner.

The state is sharded as in Rajbhandari et al. 2020, section 5.1; blocks and owners come from the
plan. The rule's update is applied block by block, so its bits do not depend on the owners of
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.fence import Fence
from holdfast.parallel.optimizer.own_sums import OwnSums
from holdfast.parallel.optimizer.owned_state import OwnedState
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.optimizer.reduction import (
    OwnedBlock,
    ReductionPlan,
    Span,
    gather_from_owners,
    reduce_to_owners,
    reduction_plan,
    sum_over_copies,
    summed_segments,
)
from holdfast.parallel.optimizer.rule import StateFormat
from holdfast.parallel.plan import Plan


def clipping_factor(gradient_norm: float, clip_norm: float) -> float:
    """The factor of gradients by torch.nn.utils.clip_grad_norm_'s rule; 1.0 if clip_norm is 0."""
    return min(1.0, clip_norm / (gradient_norm + 1e-6)) if clip_norm > 0 else 1.0


def norm_from_squares(squares: Sequence[float]) -> float:
    """The global gradient norm from every block's sum of squares.

    It is the exact sum, rounded once (math.fsum), so it depends neither on the order nor on owners.
    """
    return math.sqrt(math.fsum(squares))


class ShardedOptimizer:
    """The optimizer of one rank: reduce, (vote elsewhere), update, gather.

    Exact-mode safe. `reduce` and `gather` are collective over the ranks that hold a use of a block.
    The four phases share its attributes: the rank's position, the buffers, the plan of the
    reduction, the rule, and the sums that wait for the next phase.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        buffer: ParameterBuffer,
        accumulator: GradientAccumulator,
        world: Communicator,
        shards: Communicator,
        form: StateFormat,
        settings: Any,
        *,
        before: OwnedState | None = None,
    ) -> None:
        """Local.

        Args:
            buffer: the rank's parameters; `accumulator` sums their gradients.
            world, shards: the communicators of all ranks, and of the ranks of this stage replica.
            form: the rule and its kinds of state; `settings` are the rule's constants.
            before: the optimizer of the plan before; its tensors are reused where possible.
        """
        self._rank = rank
        self._accumulator = accumulator
        self._world, self._shards = world, shards
        self._settings = settings
        self._reduction: ReductionPlan = reduction_plan(plan, rank, buffer)
        self._shard_index = plan.stage_replicas.shard_index(rank)
        self._first_slot = sum(len(blocks) for blocks in plan.blocks[: self._shard_index])
        self.slots = sum(len(blocks) for blocks in plan.blocks)
        """The number of block keys of the plan: the length of the squares that `reduce` gives."""
        owned = self._reduction.owned
        carried = before.carried_on(buffer, owned) if before is not None else None
        self.owned_state = carried or OwnedState.new(form, buffer, owned)
        self._updates = self.owned_state.updates()
        self._own_sums: OwnSums | None = None

    @property
    def owned(self) -> tuple[OwnedBlock, ...]:
        """The blocks whose state this rank keeps."""
        return self._reduction.owned

    @property
    def form(self) -> StateFormat:
        """The rule and its kinds of state."""
        return self.owned_state.form

    def owned_gradients(self) -> Iterator[tuple[OwnedBlock, Tensor]]:
        """The owned blocks with their reduced gradients (flat), valid between reduce and update."""
        for block, span in zip(self.owned, self.owned_state.spans, strict=True):
            yield block, self.gradients[span.start : span.stop]

    def slot(self, block: OwnedBlock) -> int:
        """The position of an owned block's key among all keys of the plan, in order."""
        return self._first_slot + block.block.index

    @property
    def step(self) -> int:
        """The number of updates applied."""
        return int(self.owned_state.step)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """State by saved kind, flat, in the order of `owned`. Live memory: see `update`'s fence."""
        return self.owned_state.kinds

    @property
    def gradients(self) -> Tensor:
        """The reduced gradients of the owned blocks, flat, in the order of `owned`."""
        return self.owned_state.gradients

    def block_state(self, number: int) -> dict[str, Tensor]:
        """One owned block's live state by kind (`form.held`), flat."""
        return self.owned_state.block(number)

    def restore(self, step: int) -> None:
        """Continue after `step` updates, once parameters and `state` have been filled. Local."""
        self.owned_state.step.fill_(step)

    def restart(self) -> None:
        """Start again from the present parameters: initial state, no updates. Local."""
        self.owned_state.restart()

    def keep_own_sums(self) -> None:
        """Copy the sums that `reduce` changes from now on, for `restore_own_sums`."""
        changed = [Span(block.start, block.stop) for block in self.owned]
        changed += [first for first, _ in self._reduction.tied]
        changed += [
            Span(s.offset, s.offset + s.spec.elements)
            for s in summed_segments(self.owned_state.buffer)
        ]
        self._own_sums = OwnSums(self._accumulator, changed)

    def begin_step(self) -> None:
        """Begin a step: sums are added anew, and there is no `reduce` to undo. Local."""
        if self._own_sums is not None:
            self._own_sums.begin_step()

    def restore_own_sums(self) -> None:
        """Undo an interrupted `reduce`: the sums are this rank's own again. Local."""
        if self._own_sums is not None:
            self._own_sums.restore()

    def reduce(self) -> tuple[Tensor, int]:
        """Complete the gradient of every owned block here.

        Returns:
            squares: float64[slots] on CPU: each counted block's sum of squares in its slot if this
                rank owns it, zero elsewhere, so that a sum over ranks gives all slots.
            flags: NONFINITE | OUT_OF_RANGE as seen by this rank.
        """
        accumulator = self._accumulator
        if self._own_sums is not None:
            self._own_sums.keep()
        flags = accumulator.finish()
        flags |= sum_over_copies(self.owned_state.buffer, accumulator, self._shards)
        flags |= reduce_to_owners(self._reduction, accumulator, self._rank, self._world)
        squares = torch.zeros(self.slots, dtype=torch.float64)
        for block, gradient in self.owned_gradients():
            square = accumulator.read(block.start, block.stop, gradient)
            if block.segment.spec.counts_in_norm(self._shard_index):
                squares[self.slot(block)] = square
        return squares, flags

    def update(self, lr: float, factor: float, fence: Fence | None = None) -> None:
        """Update the owned blocks with their gradients times `factor`. Local.

        It is called only after the vote: every rank that calls it can finish.

        Args:
            fence: called before a block changes, with its position in `owned`.
        """
        state = self.owned_state
        if factor != 1.0:
            state.gradients.mul_(factor)
        state.step.add_(1)
        count = len(self._updates)
        position = 0
        while position < count:
            free = count if fence is None else min(count, fence(position) + 1)
            self.form.rule.update_blocks(
                self._updates[position:free], state.step, lr, self._settings
            )
            position = free
        state.round_masters()
        if fence is not None:
            fence(count)

    def round_masters(self) -> None:
        """Set the parameters of the owned blocks from master copies, if there are any. Local."""
        self.owned_state.round_masters()

    def gather(self) -> None:
        """Send every block's parameters from its owner to its holders. Collective over these."""
        values = self.owned_state.buffer.values
        gather_from_owners(self._reduction, values, self._rank, self._world)
