"""Shadows: copies of other ranks' optimizer blocks that follow every update, so that a rank can be lost.

Owners send the reduced gradients of a step before its vote; a shadow then applies the same update to its
copy, and holds value and moments of the block at every step that is committed. Copies may lie in host memory: they
are then updated through a small buffer on the device, by the kernel that their owner uses. Exact-mode safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.parallel.comm import SHADOWING, Communicator, Handle
from holdfast.parallel.optimizer.adamw import AdamWSettings, BlockUpdate, Fence, update_blocks
from holdfast.parallel.optimizer.reduction import LONGEST_SPAN_ELEMENTS, Span
from holdfast.parallel.plan import BlockKey, Plan

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
"""Kinds of a block's state: its master values, in the precision of the optimizer, and its moments."""


@dataclass(frozen=True, slots=True)
class ShadowedBlock:
    """A block that this rank follows, as a shadow or because it is to have it, and its place in flat buffers."""

    key: BlockKey
    owner: int
    decays: bool
    start: int
    stop: int


def shadowed_blocks(plan: Plan, rank: int) -> tuple[ShadowedBlock, ...]:
    """What a rank follows, by owner and block, so that what an owner sends lies together. Pure."""
    mine = sorted(
        (plan.owners[index][place], index, place)
        for followers in (plan.shadows, plan.incoming)
        for index, found in enumerate(followers)
        for place, ranks in enumerate(found)
        if rank in ranks
    )
    blocks: list[ShadowedBlock] = []
    start = 0
    for owner, index, place in mine:
        block = plan.blocks[index][place]
        spec = plan.layers[block.layer].parameters[index][block.spec_index]
        stop = start + block.elements
        blocks.append(ShadowedBlock((index, place), owner, spec.decay, start, stop))
        start = stop
    return tuple(blocks)


def shadow_spans(plan: Plan, owner: int) -> dict[int, tuple[Span, ...]]:
    """Shadow rank -> stretches of an owner's flat gradients that it follows, in block order. Pure."""
    spans: dict[int, list[Span]] = {}
    start = 0
    for index, place in plan.owned_places(owner):
        stop = start + plan.blocks[index][place].elements
        for rank in plan.followers(index, place):
            mine = spans.setdefault(rank, [])
            if mine and mine[-1].stop == start and stop - mine[-1].start <= LONGEST_SPAN_ELEMENTS:
                mine[-1] = Span(mine[-1].start, stop)
            else:
                mine.append(Span(start, stop))
        start = stop
    return {rank: tuple(found) for rank, found in sorted(spans.items())}


class ShadowState:
    """The copies of one rank, and what it sends to the shadows of its own blocks."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        comm: Communicator,
        settings: AdamWSettings,
        in_host_memory: bool = False,
        weight_dtype: torch.dtype | None = None,
        before: ShadowState | None = None,
    ) -> None:
        """Local. The copies are zero until they are filled.

        Args:
            in_host_memory: keep the copies there, page-locked beside a GPU; gradients stay on the device.
            weight_dtype: of the parameters, where they are to be saved from copies in host memory.
        before: of the plan before; where the same blocks are shadowed its copies are taken over.
        """
        self.blocks = shadowed_blocks(plan, rank)
        self._comm, self._settings = comm, settings
        self.in_host_memory = in_host_memory
        self.fence: Fence | None = None
        """Asked before a block changes, by its place in `blocks`, where somebody copies it meanwhile."""
        self._leaving = shadow_spans(plan, rank)
        self._arriving: dict[int, list[Span]] = {}
        start = 0
        for owner in dict.fromkeys(block.owner for block in self.blocks):
            for span in shadow_spans(plan, owner)[rank]:
                stop = start + span.stop - span.start
                self._arriving.setdefault(owner, []).append(Span(start, stop))
                start = stop
        elements = self.blocks[-1].stop if self.blocks else 0
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self._state: dict[str, Tensor]
        self._rounded: Tensor | None = None
        """The values as parameters, where these have fewer bits and are saved from here."""
        if before is not None and before.blocks == self.blocks:
            self._gradients, self._state = before._gradients, before.state
            self._rounded = before._rounded
            self._step.copy_(before._step)
        else:
            self._gradients = torch.zeros(elements, dtype=dtype, device=device)
            place = torch.device("cpu") if in_host_memory else device
            pinned = in_host_memory and device.type == "cuda"
            self._state = {
                kind: torch.zeros(elements, dtype=dtype, device=place, pin_memory=pinned)
                for kind in STATE_KINDS
            }
            if in_host_memory and weight_dtype not in (None, dtype):
                self._rounded = torch.zeros(
                    elements, dtype=weight_dtype, device=place, pin_memory=pinned
                )
        self._staged: dict[str, Tensor] | None = None
        """On the device, of the largest block's size; where copies lie in host memory."""
        if in_host_memory:
            largest = max((block.stop - block.start for block in self.blocks), default=0)
            self._staged = {
                kind: torch.empty(largest, dtype=dtype, device=device) for kind in STATE_KINDS
            }
        self._updates = [
            self._update_of(block, self._state, block.start)
            for block in (self.blocks if self._staged is None else ())
        ]
        self._copied: torch.cuda.Event | None = None
        """When the last update has reached host memory."""

    @property
    def state(self) -> dict[str, Tensor]:
        """By kind, flat, in the order of `blocks`."""
        copied = self._copied  # also asked for by threads that copy state beside a step
        if copied is not None:
            copied.synchronize()
            self._copied = None
        return self._state

    @property
    def weights(self) -> Tensor:
        """The parameters of `blocks` in host memory, flat, with the bits that their owners' have."""
        values = self.state["master"]
        return values if self._rounded is None else self._rounded

    def round_weights(self, block: ShadowedBlock) -> None:
        """Have `weights` follow the block's values, once these have been written."""
        if self._rounded is not None:
            here = slice(block.start, block.stop)
            self._rounded[here].copy_(self.state["master"][here])

    @property
    def bytes(self) -> int:
        """Memory of the copies, gradients included."""
        rounded = 0 if self._rounded is None else self._rounded.nbytes
        return 4 * self._gradients.nbytes + rounded

    def restore(self, step: int) -> None:
        """Go on from `step` updates, once `state` has been filled."""
        self._step.fill_(step)

    def exchange(self, gradients: Tensor) -> None:
        """Send the owned gradients (flat) to their shadows, receive those of what is shadowed here.

        Collective over owners and their shadows; after it a rank may vote.
        """
        comm = self._comm
        handles: list[Handle] = [
            comm.receive(self._gradients[span.start : span.stop], owner, SHADOWING.tag(number))
            for owner, spans in self._arriving.items()
            for number, span in enumerate(spans)
        ]
        handles += [
            comm.send(gradients[span.start : span.stop], shadow, SHADOWING.tag(number))
            for shadow, spans in self._leaving.items()
            for number, span in enumerate(spans)
        ]
        for handle in handles:
            handle.wait()

    def update(self, lr: float, factor: float) -> None:
        """Apply the step that was voted for. Local."""
        if not self.blocks:
            return
        if factor != 1.0:
            self._gradients.mul_(factor)
        self._step += 1
        if self._staged is None:
            if self.fence is not None:
                self.fence(len(self.blocks) - 1)
            update_blocks(self._updates, self._step, lr, self._settings)
            return
        state = self.state
        for number, block in enumerate(self.blocks):
            if self.fence is not None:
                self.fence(number)
            here, size = slice(block.start, block.stop), block.stop - block.start
            for kind, staged in self._staged.items():
                staged[:size].copy_(state[kind][here], non_blocking=True)
            update = self._update_of(block, self._staged, 0)
            update_blocks((update,), self._step, lr, self._settings)
            for kind, staged in self._staged.items():
                state[kind][here].copy_(staged[:size], non_blocking=True)
            if self._rounded is not None:
                values = self._staged["master"][:size].to(self._rounded.dtype)
                self._rounded[here].copy_(values, non_blocking=True)
        if self._gradients.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _update_of(self, block: ShadowedBlock, state: dict[str, Tensor], start: int) -> BlockUpdate:
        """One block's update, its state lying at `start` of the tensors given."""
        there = slice(start, start + block.stop - block.start)
        return BlockUpdate(
            state["master"][there],
            self._gradients[block.start : block.stop],
            state["exp_avg"][there],
            state["exp_avg_sq"][there],
            block.decays,
        )
