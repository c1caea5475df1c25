"""The sharded optimizer (ZeRO-1): state in whole-row blocks, each updated by its owner.

The state is sharded as in Rajbhandari et al. 2020, section 5.1; blocks and owners come from the
plan. The rule's update is applied block by block, so its bits do not depend on the owners of
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.parallel.comm import Groups, Handle
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.exchange import (
    ExchangeSettings,
    Gathering,
    GradientExchange,
    OwnedBlock,
    ParameterArrival,
    Routes,
    gathering,
    receive_buckets,
    routes,
    send_bucket,
    update_runs,
    wire_of,
)
from holdfast.parallel.optimizer.fence import Fence
from holdfast.parallel.optimizer.flat_values import FlatValues
from holdfast.parallel.optimizer.kernels import operations_of
from holdfast.parallel.optimizer.owned_state import OwnedState
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.optimizer.rules import MASTER, HeadFactors, ParameterGroups, StateFormat
from holdfast.parallel.optimizer.shadow_state import ShadowState
from holdfast.parallel.optimizer.sharding import shared_gradients
from holdfast.parallel.plan import BlockKey, Plan, shards, update_ends

_MOST_ROWS = 1 << 14
"""More than a layer's table of parameters has."""
_PLACE_BITS = 40
"""The bits of an element's place in its parameter, in the place that `bit_sums` weighs it by."""


def routes_of_parameters(
    found: Routes, plan: Plan, rank: int, buffer: ParameterBuffer, exchange: ExchangeSettings
) -> Routes:
    """The routes of parameters: those of gradients, `found`, unless other ranks keep them. Pure."""
    if not shards(plan, "gradients") and plan.all_holders_contribute:
        return found
    return routes(plan, rank, buffer, exchange.bucket_elements, "parameters")


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

    Exact-mode safe. `reduce` and `gather` are collective over the ranks that hold a use of a block
    and its followers. The phases share its attributes: the rank's buffers and copies of others'
    blocks, the routes of messages and what is on its way, and the rule's constants.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        buffer: ParameterBuffer,
        accumulator: GradientAccumulator,
        groups: Groups,
        form: StateFormat,
        constants: ParameterGroups[Any],
        *,
        arrival: ParameterArrival,
        shadows: ShadowState | None = None,
        exchange: ExchangeSettings | None = None,
        before: OwnedState | None = None,
    ) -> None:
        """Local.

        Args:
            buffer: the rank's parameters; `accumulator` sums their gradients.
            groups: the communicators of this rank.
            form: the rule and its kinds of state; `constants` are the rule's, by the parameters'
                names.
            arrival: awaits gathered parameters before the buffer's modules use them.
            shadows: the blocks that this rank follows; None if no rank follows any.
            exchange: the choices of the run; None: the defaults.
            before: the optimizer of the plan before; its tensors are reused where possible.
        """
        exchange = exchange or ExchangeSettings()
        self._accumulator, self._rank = accumulator, rank
        self._world, self._constants = groups.world, constants
        self._routes: Routes = routes(plan, rank, buffer, exchange.bucket_elements, "gradients")
        self._parameter_routes = routes_of_parameters(self._routes, plan, rank, buffer, exchange)
        sizes = [len(blocks) for blocks in plan.blocks]
        self._first_slots = list(accumulate(sizes, initial=0))
        self.slots = sum(sizes)
        """The number of block keys of the plan: the length of the squares that `reduce` gives."""
        owned = self._routes.owned
        carried = before.carried_on(buffer, owned) if before is not None else None
        self.owned_state = carried or OwnedState.new(form, buffer, owned, before)
        self._updates = self.owned_state.updates(constants)
        self._ends = update_ends(
            (found.block.elements, found.spec.updated_together(found.block.elements))
            for found in owned
        )
        self._runs = update_runs(self._routes, self._ends)
        self._shadows, self._arrival = shadows, arrival
        self._sharing = shared_gradients(
            plan, rank, buffer, accumulator, groups.world, exchange.reduce_dtype
        )
        self._to_others = gathering(
            self._parameter_routes,
            rank,
            lambda key, holder: bool(plan.shadows) and holder in plan.shadows[key[0]][key[1]],
        )
        self._exchange = GradientExchange(
            self._routes,
            accumulator,
            self.owned_state.gradients,
            groups.world,
            wire_of(accumulator, exchange, groups.world),
            overlap=exchange.overlap,
        )
        if shadows is not None:
            self._exchange.follow(shadows.routes, shadows.copies.gradients)

    @property
    def owned(self) -> tuple[OwnedBlock, ...]:
        """The blocks whose state this rank keeps."""
        return self._routes.owned

    @property
    def form(self) -> StateFormat:
        """The rule and its kinds of state."""
        return self.owned_state.form

    def owned_gradients(self) -> Iterator[tuple[OwnedBlock, Tensor]]:
        """The owned blocks with their reduced gradients (flat), valid between reduce and update."""
        for block, span in zip(self.owned, self.owned_state.spans, strict=True):
            yield block, self.gradients.part(span.start, span.stop)

    def slot(self, key: BlockKey) -> int:
        """The position of a block among all blocks of the plan, in order."""
        part, place = key
        return self._first_slots[part] + place

    @property
    def step(self) -> int:
        """The number of updates applied."""
        return int(self.owned_state.step)

    @property
    def state(self) -> Mapping[str, FlatValues]:
        """State by saved kind, flat, in the order of `owned`. Live memory: see `update`'s fence."""
        return self.owned_state.kinds

    @property
    def gradients(self) -> FlatValues:
        """The reduced gradients of the owned blocks, flat, in the order of `owned`."""
        return self.owned_state.gradients

    def parameters(self, number: int) -> Tensor:
        """One owned block's live parameters, flat."""
        block = self.owned[number]
        return self.owned_state.parameters.part(block.start, block.stop)

    def block_state(self, number: int) -> dict[str, Tensor]:
        """One owned block's live state by kind (`form.held`), flat."""
        return self.owned_state.block(number)

    def parameter_squares(self) -> Tensor:
        """Each owned block's sum of squares of its parameters (their master values). Local.

        Returns:
            float64[slots] on CPU, as `reduce` gives the squares of gradients.
        """
        squares = torch.zeros(self.slots, dtype=torch.float64)
        for number, block in enumerate(self.owned):
            values = self.block_state(number)[MASTER]
            squares[self.slot(block.key)] = operations_of(values.device).sum_squares(values)
        return squares

    def bit_sums(self, of: Literal["gradients", "parameters"], layers: int) -> list[int]:
        """Of each layer, the weighted sum modulo 2**64 of the bits of the owned blocks. Local.

        Added up over all ranks, it is that of the layer: the same in any layout with as many parts,
        whatever the owners.

        Args:
            of: the reduced gradients, between reduce and update, or the parameters' master values.
            layers: the layers of the model.
        """
        parts: list[tuple[Tensor, int]] = []
        for number, (owned, gradients) in enumerate(self.owned_gradients()):
            values = gradients if of == "gradients" else self.block_state(number)[MASTER]
            row = owned.block.part * _MOST_ROWS + owned.block.spec_index
            place = owned.block.row_start * owned.spec.row_elements
            parts.append((values, (row << _PLACE_BITS) + place))
        sums = [0] * layers
        if parts:
            found = operations_of(parts[0][0].device).bit_sums(parts)
            for owned, total in zip(self.owned, found, strict=True):
                sums[owned.block.layer] += total
        return [total % 2**64 for total in sums]

    def restore(self, step: int) -> None:
        """Continue after `step` updates, once parameters and `state` have been filled. Local."""
        self.owned_state.restore(step)

    def restart(self) -> None:
        """Start again from the present parameters: initial state, no updates. Local."""
        self.owned_state.restart()

    def begin_step(
        self,
        offers: Mapping[nn.Parameter, int],
        sending: Callable[[], None] = lambda: None,
        only: frozenset[int] | None = None,
    ) -> None:
        """Begin a step: gradients are added from now on, and leave when they are complete. Local.

        Args:
            offers: the number of gradients that each parameter is offered in this step.
            sending: called in another thread once the first sums are on their way.
            only: the micro-batches that are computed; None: all.
        """
        if self._sharing is None:
            self._exchange.begin(sending)
        else:
            self._exchange.begin(lambda: None)
            self._sharing.begin(self._exchange.complete, sending, only)
        self.go_on(offers)

    def go_on(self, offers: Mapping[nn.Parameter, int]) -> None:
        """Say again how many gradients each parameter is offered from now on. Local."""
        complete = self._exchange.complete
        if self._sharing is None:
            self._accumulator.expect(offers, complete)
        else:
            self._accumulator.expect(offers, complete, self._sharing.add)

    def close(self) -> None:
        """End what an interrupted step has begun, once the communicators are aborted. Local."""
        self._exchange.close()
        if self._sharing is not None:
            self._sharing.close()
        self._accumulator.forget()

    def finish_sums(self) -> int:
        """Complete the sums that this rank keeps, before any is reduced. Returns flags.

        Collective over its shard group.
        """
        flags = self._accumulator.finish()
        return flags if self._sharing is None else flags | self._sharing.finish()

    def reduce(self) -> tuple[Tensor, int]:
        """Complete the gradient of every block that this rank owns or follows.

        Returns:
            squares: float64[slots] on CPU: each block's sum of squares in its slot if this rank
                owns it, zero elsewhere, so that a sum over ranks gives all slots. Loads of biases
                are no gradients: theirs is zero, too.
            flags: NONFINITE | OUT_OF_RANGE as seen by this rank.
        """
        flags = self.finish_sums()
        self._exchange.complete(self.owned_state.buffer.parameters)
        found, raised = self._exchange.finish()
        squares = torch.zeros(self.slots, dtype=torch.float64)
        for block, square in zip(self.owned, found, strict=True):
            if block.spec.balance is None:
                squares[self.slot(block.key)] = square
        return squares, flags | raised

    def update(
        self,
        lr: float,
        factor: float,
        fence: Fence | None = None,
        heads: HeadFactors = MappingProxyType({}),
    ) -> None:
        """Update the owned blocks with their gradients times `factor`. Local.

        It is called only after the vote: every rank that calls it can finish.

        Args:
            fence: called before a block changes, with its position in `owned`.
            heads: the factors of heads that are clipped.
        """
        for _ in self._updated_buckets(lr, factor, fence, heads):
            pass

    def _updated_buckets(
        self, lr: float, factor: float, fence: Fence | None, heads: HeadFactors
    ) -> Iterator[int]:
        """Update bucket by bucket, in the order of first use. Gives the row of each updated one."""
        state = self.owned_state
        if factor != 1.0:
            for gradients in state.gradients.tensors:
                gradients.mul_(factor)
        state.begin_update([(run[0].begin, run[-1].end) for run in self._runs])
        free = len(self._updates) if fence is None else 0
        for run in self._runs:
            position, end = run[0].begin, run[-1].end
            state.await_update(position)
            while position < end:
                if fence is not None and free < self._ends[position]:
                    free = fence(self._ends[position] - 1) + 1
                stop = min(end, free)
                while self._ends[stop - 1] > stop:  # in the middle of a matrix
                    stop -= 1
                self._constants.update(self._updates[position:stop], state.step, lr, heads)
                position = stop
            state.end_update(run[0].begin, end)
            yield from (owned.bucket.row for owned in run)
        if fence is not None:
            fence(len(self._updates))

    def update_and_send(
        self,
        lr: float,
        factor: float,
        fence: Fence | None = None,
        heads: HeadFactors = MappingProxyType({}),
        sending: Callable[[], None] = lambda: None,
    ) -> None:
        """Update the owned blocks, and begin to gather the parameters of all blocks.

        A holder that follows a block takes its parameters from its own copy, which is updated
        before. Collective over the holders of blocks, which wait in the `arrival` only.
        A loss of a peer meanwhile is raised there, too: the update itself is always done whole.

        Args:
            fence: called before a block changes, with its position in `owned`.
            heads: the factors of heads that are clipped.
            sending: called once the first parameters are on their way, or would be.
        """
        buffer = self.owned_state.buffer
        sends: list[Handle] = []
        lost: PeerLost | None = None
        for number, row in enumerate(self._updated_buckets(lr, factor, fence, heads)):
            if lost is None:
                try:
                    parameters = self.owned_state.parameters
                    sends += send_bucket(self._world, parameters, self._to_others, row)
                except PeerLost as error:
                    lost = error
            if number == 0:
                sending()
        try:
            # Not before: until its fence has let all blocks go, a snapshot may copy what would
            # arrive.
            if lost is None:
                self._receive(self._to_others, sends)
        except PeerLost as error:
            lost = error
        if lost is not None:
            self._arrival.lose(lost)
        if self._shadows is not None:
            self._shadows.write_weights(buffer.part, self._to_others.updated_here)

    def _receive(self, found: Gathering, sends: Sequence[Handle]) -> None:
        buffer = self.owned_state.buffer
        self._arrival.begin(receive_buckets(self._world, buffer, found), sends)
        for first, second in found.copies:
            buffer.part(second.start, second.stop).copy_(buffer.part(first.start, first.stop))

    def round_masters(self) -> None:
        """Set the parameters of the owned blocks from master copies, if there are any. Local."""
        self.owned_state.round_masters(0, len(self.owned))

    def gather(self, has: Callable[[BlockKey, int], bool] = lambda key, holder: False) -> None:
        """Send blocks' parameters from their owners to all holders. Collective over these.

        Args:
            has: (block, rank) -> whether the rank has its parameters, the same on all ranks.
        """
        to_all = gathering(self._parameter_routes, self._rank, has)
        sends = [
            handle
            for owned in reversed(self._routes.mine)
            for handle in send_bucket(
                self._world, self.owned_state.parameters, to_all, owned.bucket.row
            )
        ]
        self._receive(to_all, sends)
        self._arrival.finish()
