"""The optimizer state of a rank's own blocks, flat, in pieces. Local; exact-mode safe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.optimizer.exchange import OwnedBlock
from holdfast.parallel.optimizer.flat_values import FlatValues, pieces_of
from holdfast.parallel.optimizer.host_update import HostUpdate
from holdfast.parallel.optimizer.parameter_buffer import OwnedParameters, ParameterBuffer
from holdfast.parallel.optimizer.rules import (
    MASTER,
    BlockUpdate,
    ParameterGroups,
    Place,
    StateFormat,
)
from holdfast.parallel.optimizer.spans import Span
from holdfast.parallel.plan import block_box


@dataclass(frozen=True, slots=True)
class OwnedState:
    """The values of a rank's own blocks, flat in the order of `blocks`: [elements of all blocks].

    A rank that keeps a piece in a change of plan keeps its tensors; see `new` and `carried_on`.
    """

    form: StateFormat
    buffer: ParameterBuffer
    parameters: OwnedParameters
    """Those of the blocks."""
    blocks: tuple[OwnedBlock, ...]
    step: Tensor
    """float32 scalar: the number of updates applied."""
    gradients: FlatValues
    """The reduced gradients, valid between reduction and update."""
    kinds: Mapping[str, FlatValues]
    """The values of the `form.saved` kinds; live memory."""
    spans: tuple[Span, ...]
    """The span of each block in these values."""
    host: HostUpdate | None = None
    """The update on the host, if the state lies there."""

    @classmethod
    def new(
        cls,
        form: StateFormat,
        buffer: ParameterBuffer,
        blocks: tuple[OwnedBlock, ...],
        before: OwnedState | None = None,
    ) -> OwnedState:
        """The state before the first update; page-locked if it lies on the host beside a GPU.

        Args:
            before: the state of another plan, whose pieces are used where they lie; the others are
                to be filled.
        """
        on_host = form.on_host
        spans: list[Span] = []
        end = 0
        for block in blocks:
            spans.append(Span(end, end + block.block.elements))
            end = spans[-1].stop
        device = buffer.device
        place = torch.device("cpu") if on_host else device
        pinned = on_host and device.type == "cuda"
        pieces = pieces_of(
            (block.key, block.block.layer, block.spec, block.block.elements) for block in blocks
        )
        zeros = {
            kind: FlatValues.zeros(
                pieces,
                form.precision_of(kind).dtype,
                place,
                None if before is None else before.kinds[kind],
                pinned=pinned,
            )
            for kind in form.saved
        }
        known = None if before is None else before.gradients
        gradients = FlatValues.zeros(pieces, form.dtype, device, known)
        guests = sum(block.block.elements for block in blocks if block.is_guest)
        parameters = OwnedParameters(buffer, guests)
        places = [Span(block.start, block.stop) for block in blocks]
        state = cls(
            form,
            buffer,
            parameters,
            blocks,
            step=torch.zeros((), dtype=torch.float32, device=place),
            gradients=gradients,
            kinds=zeros,
            spans=tuple(spans),
            host=HostUpdate(parameters, places, gradients, zeros.get(MASTER)) if on_host else None,
        )
        if before is None:
            state._fill_initial()
            state.copy_masters()
        return state

    def _fill_initial(self) -> None:
        for kind in self.form.rule.kinds:
            for values in self.kinds[kind.name].tensors:
                values.fill_(kind.initial)

    def carried_on(
        self, buffer: ParameterBuffer, blocks: tuple[OwnedBlock, ...]
    ) -> OwnedState | None:
        """The same tensors for the next plan; None if it has other blocks or another buffer.

        The step counter is a copy, so that this state stays valid until the next plan is active.
        """
        if buffer is not self.buffer or blocks != self.blocks:
            return None
        return replace(self, step=self.step.clone())

    def restore(self, step: int) -> None:
        """Go on after `step` updates, with the state that has been filled."""
        self.step.fill_(step)
        for number, block in enumerate(self.blocks):
            if block.is_guest:  # no rank sends it to its owner
                self.round_masters(number, number + 1)

    def restart(self) -> None:
        """Reset to the state before the first update, for the present parameters."""
        self.step.zero_()
        self._fill_initial()
        self.copy_masters()

    def copy_masters(self) -> None:
        """Set the master copies, if any, from the parameters of the blocks."""
        master = self.kinds.get(MASTER)
        if master is not None:
            for block, span in zip(self.blocks, self.spans, strict=True):
                values = self.parameters.part(block.start, block.stop)
                master.part(span.start, span.stop).copy_(values)

    def round_masters(self, begin: int, end: int) -> None:
        """Set the parameters of blocks [begin, end) from their master copies, if any."""
        master = self.kinds.get(MASTER)
        if master is not None:
            for block, span in zip(self.blocks[begin:end], self.spans[begin:end], strict=True):
                values = self.parameters.part(block.start, block.stop)
                values.copy_(master.part(span.start, span.stop))

    def block(self, number: int) -> dict[str, Tensor]:
        """One block's live state by kind (`form.held`), flat."""
        block, span = self.blocks[number], self.spans[number]
        found = {kind: values.part(span.start, span.stop) for kind, values in self.kinds.items()}
        return {MASTER: self.parameters.part(block.start, block.stop), **found}

    def updates(self, groups: ParameterGroups[Any]) -> list[BlockUpdate]:
        """The input of the update, for each block."""
        found = []
        for number, (block, span) in enumerate(zip(self.blocks, self.spans, strict=True)):
            state, gradients = self.block(number), self.gradients
            if self.host is not None:
                state[MASTER] = self.host.master.part(span.start, span.stop)
                gradients = self.host.gradients
            place = groups.place(block.spec, block_box(block.spec, block.block))
            gradient = gradients.part(span.start, span.stop)
            found.append(block_update(self.form, state, gradient, place))
        return found

    def begin_update(self, runs: Sequence[tuple[int, int]]) -> None:
        """Begin an update of runs of blocks [first, last), in this order."""
        self.step.add_(1)
        if self.host is not None:
            self.host.begin([(first, last, self._elements(first, last)) for first, last in runs])

    def await_update(self, first: int) -> None:
        """Wait until the run that begins with a block can be updated."""
        if self.host is not None:
            self.host.wait(first)

    def end_update(self, first: int, last: int) -> None:
        """Set the parameters of an updated run from what has been updated, if that is a copy."""
        if self.host is not None:
            self.host.write_back(first, last, self.spans[first].start)
        else:
            self.round_masters(first, last)

    def _elements(self, first: int, last: int) -> Span:
        return Span(self.spans[first].start, self.spans[last - 1].stop)


def block_update(
    form: StateFormat, state: Mapping[str, Tensor], gradient: Tensor, place: Place
) -> BlockUpdate:
    """The input of the update for a block with this state by kind. Pure.

    Args:
        place: that of the block's parameter.
    """
    kinds = tuple(state[kind.name] for kind in form.rule.kinds)
    return BlockUpdate(
        state[MASTER],
        gradient,
        kinds,
        place.decays,
        group=place.group,
        matrix=place.matrix,
        balance=place.balance,
        heads=place.heads,
    )
