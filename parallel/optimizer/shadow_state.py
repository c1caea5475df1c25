"""Shadows: copies of other ranks' optimizer blocks that follow every update.

With them a run survives the loss of a rank. Owners send the reduced gradients of a step before its
vote (see exchange/). A shadow then applies the same update to its copy, so it holds the block's
state after every committed step. A shadow that computes with the block's parameters takes them from
its copy, and costs the link only what the gathering of these parameters would have cost. Copies may
lie in host memory: they are updated through a small buffer on the device, by the kernel that their
owner uses. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.layout import ParameterSpec
from holdfast.parallel.optimizer.exchange import follower_routes
from holdfast.parallel.optimizer.fence import Fence
from holdfast.parallel.optimizer.flat_values import FlatValues, one_piece, pieces_of
from holdfast.parallel.optimizer.owned_state import block_update
from holdfast.parallel.optimizer.rules import (
    MASTER,
    BlockUpdate,
    HeadFactors,
    ParameterGroups,
    Place,
    StateFormat,
)
from holdfast.parallel.optimizer.spans import KeptSpans, Span
from holdfast.parallel.plan import BlockKey, Plan, block_box, update_ends


@dataclass(frozen=True, slots=True)
class ShadowedBlock:
    """A block that this rank follows, as a shadow or before it becomes the owner."""

    key: BlockKey
    layer: int
    owner: int
    spec: ParameterSpec
    """The row of its parameter."""
    start: int
    """The first element of the block in the flat copies."""
    stop: int
    """The element after the last."""


def shadowed_blocks(plan: Plan, rank: int) -> tuple[ShadowedBlock, ...]:
    """The blocks that a rank follows, each owner's together and in its order. Pure."""
    mine = sorted(
        (plan.owners[index][place], plan.depth((index, place)))
        for followers in (plan.shadows, plan.incoming)
        for index, found in enumerate(followers)
        for place, ranks in enumerate(found)
        if rank in ranks
    )
    blocks: list[ShadowedBlock] = []
    start = 0
    for owner, (*_, key) in mine:
        block = plan.block(key)
        stop = start + block.elements
        spec = plan.spec_of(block)
        blocks.append(ShadowedBlock(block.key, block.layer, owner, spec, start, stop))
        start = stop
    return tuple(blocks)


@dataclass(frozen=True, slots=True)
class ShadowCopies:
    """The values of shadowed blocks, flat in the order of `blocks`: [elements of all blocks].

    A rank that keeps a piece in a change of plan keeps its tensors.
    """

    blocks: tuple[ShadowedBlock, ...]
    step: Tensor
    """float32 scalar on the device: the number of updates applied."""
    gradients: FlatValues
    """The reduced gradients, on the device."""
    kinds: Mapping[str, FlatValues]
    """The values of the `held` kinds, on the device or in host memory."""
    rounded: FlatValues | None
    """The master values rounded to parameters, if parameters have fewer bits and are saved from
    here."""

    @classmethod
    def new(
        cls,
        blocks: tuple[ShadowedBlock, ...],
        form: StateFormat,
        device: torch.device,
        *,
        in_host_memory: bool,
        before: ShadowCopies | None = None,
    ) -> ShadowCopies:
        """Copies of zeros, to be filled; page-locked if they lie in host memory beside a GPU.

        Args:
            before: the copies of another plan, whose pieces are used where they lie.
        """
        place = torch.device("cpu") if in_host_memory else device
        pinned = in_host_memory and device.type == "cuda"
        pieces = pieces_of(
            (block.key, block.layer, block.spec, block.stop - block.start) for block in blocks
        )

        def zeros(dtype: torch.dtype, known: FlatValues | None) -> FlatValues:
            return FlatValues.zeros(pieces, dtype, place, known, pinned=pinned)

        gradients, kinds, rounded = None, {}, None
        if before is not None:
            gradients, kinds, rounded = before.gradients, before.kinds, before.rounded
        rounds = in_host_memory and form.precision.has_master
        return cls(
            blocks,
            step=torch.zeros((), dtype=torch.float32, device=device),
            gradients=FlatValues.zeros(pieces, form.dtype, device, gradients),
            kinds={k: zeros(form.precision_of(k).dtype, kinds.get(k)) for k in form.held},
            rounded=zeros(form.precision.dtype, rounded) if rounds else None,
        )

    def carried_on(self, blocks: tuple[ShadowedBlock, ...]) -> ShadowCopies | None:
        """The same tensors for the next plan, if it has these blocks; the step is a copy.

        Else None.
        """
        return replace(self, step=self.step.clone()) if blocks == self.blocks else None

    @property
    def bytes(self) -> int:
        """The memory of the copies in bytes, gradients included."""
        held = sum(values.nbytes for values in self.kinds.values())
        return self.gradients.nbytes + held + (0 if self.rounded is None else self.rounded.nbytes)

    def update_of(
        self,
        form: StateFormat,
        block: ShadowedBlock,
        place: Place,
        kinds: Mapping[str, FlatValues],
        start: int,
    ) -> BlockUpdate:
        """One block's update, with its state at `start` of the given values.

        Args:
            place: as for `block_update`.
        """
        stop = start + block.stop - block.start
        state = {kind: values.part(start, stop) for kind, values in kinds.items()}
        gradient = self.gradients.part(block.start, block.stop)
        return block_update(form, state, gradient, place)


class ShadowState:
    """The copies on one rank, and the routes of the gradients that followers get."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        *,
        device: torch.device,
        form: StateFormat,
        groups: ParameterGroups[Any],
        bucket_elements: int,
        in_host_memory: bool = False,
        before: ShadowCopies | None = None,
    ) -> None:
        """The copies are zero until they are filled. Local.

        Args:
            form: the rule and its kinds of state; `groups` have the rule's constants.
            bucket_elements: as for `ExchangeSettings`.
            in_host_memory: keep the copies in host memory, page-locked beside a GPU; gradients stay
                on the device.
            before: the shadow state of the plan before; its tensors are reused if the same blocks
                are shadowed.
        """
        self.blocks = shadowed_blocks(plan, rank)
        self._form, self._groups = form, groups
        self._places = [
            groups.place(block.spec, block_box(block.spec, plan.block(block.key)))
            for block in self.blocks
        ]
        self.in_host_memory = in_host_memory
        places = {block.key: Span(block.start, block.stop) for block in self.blocks}
        self.routes = follower_routes(plan, rank, places, bucket_elements)
        """The routes of the reduced gradients that this rank sends to followers and receives."""
        carried = before.carried_on(self.blocks) if before is not None else None
        self._copies = carried or ShadowCopies.new(
            self.blocks, form, device, in_host_memory=in_host_memory, before=before
        )
        self._staged: dict[str, FlatValues] | None = None
        """Device memory for what is updated as one, if copies lie in host memory; else None."""
        ends = update_ends(
            (size, block.spec.updated_together(size))
            for block in self.blocks
            for size in (block.stop - block.start,)
        )
        self._runs = list(pairwise([0, *sorted(set(ends))]))
        """The blocks [first, last) that are updated as one: those of a matrix, or each alone."""
        if in_host_memory:
            largest = max(
                (self.blocks[b - 1].stop - self.blocks[a].start for a, b in self._runs), default=0
            )
            pieces = one_piece(KeptSpans([Span(0, largest)]))
            self._staged = {
                kind: FlatValues(
                    pieces,
                    partial(torch.empty, dtype=form.precision_of(kind).dtype, device=device),
                )
                for kind in form.held
            }
        self._updates = [
            self._copies.update_of(form, block, place, self._copies.kinds, block.start)
            for block, place in zip(self.blocks, self._places, strict=True)
            if self._staged is None
        ]
        self._copied: torch.cuda.Event | None = None
        """The event after which the last update is in host memory."""

    @property
    def copies(self) -> ShadowCopies:
        """The tensors of the shadowed blocks, once the last update has reached them."""
        copied = self._copied  # also asked for by threads that copy state beside a step
        if copied is not None:
            copied.synchronize()
            self._copied = None
        return self._copies

    @property
    def state(self) -> Mapping[str, FlatValues]:
        """By kind (`form.held`), flat, in the order of `blocks`."""
        return self.copies.kinds

    def block_state(self, block: ShadowedBlock) -> dict[str, Tensor]:
        """One block's live state by kind (`form.held`), flat."""
        return {kind: values.part(block.start, block.stop) for kind, values in self.state.items()}

    @property
    def weights(self) -> FlatValues:
        """The parameters of `blocks` in host memory, flat, bit-equal to those of their owners."""
        copies = self.copies
        return copies.kinds[MASTER] if copies.rounded is None else copies.rounded

    def round_weights(self, block: ShadowedBlock) -> None:
        """Set `weights` from the block's master values, once these have been written."""
        copies = self.copies
        if copies.rounded is not None:
            master = copies.kinds[MASTER].part(block.start, block.stop)
            copies.rounded.part(block.start, block.stop).copy_(master)

    def restore(self, step: int) -> None:
        """Continue after `step` updates, once `state` has been filled."""
        self._copies.step.fill_(step)

    def write_weights(
        self,
        part: Callable[[int, int], Tensor],
        places: Mapping[BlockKey, tuple[Span, ...]],
    ) -> None:
        """Write the parameters of followed blocks to their places among a rank's parameters.

        They are bit-equal to those of their owners. Local.
        """
        master = self._copies.kinds[MASTER]
        for block in self.blocks:
            for span in places.get(block.key, ()):
                part(span.start, span.stop).copy_(master.part(block.start, block.stop))

    def update(
        self,
        lr: float,
        factor: float,
        fence: Fence | None = None,
        heads: HeadFactors = MappingProxyType({}),
    ) -> None:
        """Apply the update of the committed step. Local.

        Args:
            fence: called before a block changes, with its position in `blocks`.
            heads: the factors of heads that are clipped.
        """
        if not self.blocks:
            return
        copies = self.copies
        if factor != 1.0:
            for gradients in copies.gradients.tensors:
                gradients.mul_(factor)
        copies.step.add_(1)
        if self._staged is not None:
            self._update_through(self._staged, copies, lr, fence, heads)
            return
        if fence is not None:
            fence(len(self.blocks) - 1)
        self._groups.update(self._updates, copies.step, lr, heads)

    def _update_through(
        self,
        staged: Mapping[str, FlatValues],
        copies: ShadowCopies,
        lr: float,
        fence: Fence | None,
        heads: HeadFactors,
    ) -> None:
        """Update copies in host memory block by block, through device memory."""
        for first, last in self._runs:
            if fence is not None:
                fence(last - 1)
            start, stop = self.blocks[first].start, self.blocks[last - 1].stop
            size = stop - start
            for kind, values in staged.items():
                there = copies.kinds[kind].part(start, stop)
                values.part(0, size).copy_(there, non_blocking=True)
            updates = [
                copies.update_of(self._form, block, place, staged, block.start - start)
                for block, place in zip(
                    self.blocks[first:last], self._places[first:last], strict=True
                )
            ]
            self._groups.update(updates, copies.step, lr, heads)
            for kind, values in staged.items():
                there = copies.kinds[kind].part(start, stop)
                there.copy_(values.part(0, size), non_blocking=True)
            if copies.rounded is not None:
                parameters = staged[MASTER].part(0, size).to(copies.rounded.dtype)
                copies.rounded.part(start, stop).copy_(parameters, non_blocking=True)
        if copies.gradients.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
