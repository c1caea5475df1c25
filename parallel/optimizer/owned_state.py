"""The optimizer state of a rank's own blocks, flat. Local; exact-mode safe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.optimizer.reduction import OwnedBlock, Span
from holdfast.parallel.optimizer.rule import MASTER, BlockUpdate, StateFormat


@dataclass(frozen=True, slots=True)
class OwnedState:
    """Tensors of a rank's own blocks, flat in the order of `blocks`: [elements of all of them].

    A change of plan that leaves a rank its blocks leaves it these tensors: see `carried_on`.
    """

    form: StateFormat
    buffer: ParameterBuffer
    blocks: tuple[OwnedBlock, ...]
    step: Tensor
    """float32 scalar: how many updates have been applied."""
    gradients: Tensor
    """Reduced gradients, valid between reduction and update."""
    kinds: Mapping[str, Tensor]
    """`form.saved` kinds; live memory."""
    spans: tuple[Span, ...]
    """Of each block in these tensors."""

    @classmethod
    def new(
        cls, form: StateFormat, buffer: ParameterBuffer, blocks: tuple[OwnedBlock, ...]
    ) -> OwnedState:
        """The state before the first update."""
        spans: list[Span] = []
        end = 0
        for block in blocks:
            spans.append(Span(end, end + block.block.elements))
            end = spans[-1].stop
        device = buffer.values.device
        zeros = {kind: torch.zeros(end, dtype=form.dtype, device=device) for kind in form.saved}
        state = cls(
            form,
            buffer,
            blocks,
            step=torch.zeros((), dtype=torch.float32, device=device),
            gradients=torch.zeros(end, dtype=form.dtype, device=device),
            kinds=zeros,
            spans=tuple(spans),
        )
        for kind in form.rule.kinds:
            if kind.initial:
                zeros[kind.name].fill_(kind.initial)
        state.copy_masters()
        return state

    def carried_on(
        self, buffer: ParameterBuffer, blocks: tuple[OwnedBlock, ...]
    ) -> OwnedState | None:
        """The same tensors for the next plan, if it has the same blocks in the same buffer.

        The step counter is a copy, so that this state stays as it is until the next plan is in
        force.
        """
        if buffer is not self.buffer or blocks != self.blocks:
            return None
        return replace(self, step=self.step.clone())

    def restart(self) -> None:
        """Set the state before the first update, for the parameters as they are now."""
        self.step.zero_()
        for kind in self.form.rule.kinds:
            self.kinds[kind.name].fill_(kind.initial)
        self.copy_masters()

    def copy_masters(self) -> None:
        """Write the master copies from the parameters of the blocks, where there are any."""
        master = self.kinds.get(MASTER)
        if master is not None:
            for block, span in zip(self.blocks, self.spans, strict=True):
                values = self.buffer.values[block.start : block.stop]
                master[span.start : span.stop].copy_(values)

    def round_masters(self) -> None:
        """Write the parameters of the blocks from their master copies, where there are any."""
        master = self.kinds.get(MASTER)
        if master is not None:
            for block, span in zip(self.blocks, self.spans, strict=True):
                values = self.buffer.values[block.start : block.stop]
                values.copy_(master[span.start : span.stop])

    def block(self, number: int) -> dict[str, Tensor]:
        """One block's live state by kind (`form.held`), flat."""
        block, span = self.blocks[number], self.spans[number]
        found = {kind: values[span.start : span.stop] for kind, values in self.kinds.items()}
        return {MASTER: self.buffer.values[block.start : block.stop], **found}

    def updates(self) -> list[BlockUpdate]:
        """What the rule's update takes of each block."""
        return [
            block_update(
                self.form,
                self.block(number),
                self.gradients[span.start : span.stop],
                decays=block.segment.spec.decay,
            )
            for number, (block, span) in enumerate(zip(self.blocks, self.spans, strict=True))
        ]


def block_update(
    form: StateFormat, state: Mapping[str, Tensor], gradient: Tensor, *, decays: bool
) -> BlockUpdate:
    """What the rule's update takes of a block with this state by kind. Pure."""
    kinds = tuple(state[kind.name] for kind in form.rule.kinds)
    return BlockUpdate(state[MASTER], gradient, kinds, decays)
