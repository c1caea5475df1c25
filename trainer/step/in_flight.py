"""The step in flight on one rank: the gradients that its sums include, and those it skips.

An interrupted step is resumed: parameters whose sums include a micro-batch skip its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from holdfast.parallel.layout import contributing_parts
from holdfast.parallel.optimizer import Segment
from holdfast.parallel.plan import Plan
from holdfast.parallel.schedules import Action, Op
from holdfast.trainer.step.construction import ModelParts
from holdfast.trainer.step.partial_sums import (
    NOT_INTERRUPTED,
    Included,
    InterruptedStep,
    ParameterKey,
)

_BACKWARDS = (Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)


class StepInFlight:
    """The gradient sums and losses of the running step on one rank. Local; exact-mode safe."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        model: ModelParts,
        program: Iterable[Action],
        step: int,
    ) -> None:
        """Nothing is computed yet.

        Args:
            program: this rank's actions of a whole step.
            step: the next step, counted from 0, or the one interrupted under the plan before.
        """
        self.step = step
        self._plan, self._buffer, self._accumulator = plan, model.buffer, model.accumulator
        self._parts, self._slices = plan.parts_of(rank), model.accumulator.slices
        self._interrupted = NOT_INTERRUPTED
        self._own_losses: dict[int, Tensor] = {}
        """The loss sums of an interrupted step that this rank reports again, by micro-batch."""
        self._backwards = 0
        self._half = sum(action.op in _BACKWARDS for action in program) // 2
        self._at_half: Callable[[], None] = lambda: None

    def begin(self, step: int, at_half: Callable[[], None]) -> bool:
        """Begin `step`. Returns whether it is an interrupted step whose sums continue.

        Args:
            at_half: called when half of a whole step's backward passes have begun.
        """
        self.step, self._backwards, self._at_half = step, 0, at_half
        if self._interrupted.step == step:
            return True
        self._interrupted = NOT_INTERRUPTED
        self._own_losses = {}
        self._accumulator.clear()
        return False

    def resume(self, step: int, included: Included, before: StepInFlight | None) -> None:
        """Have only the micro-batches missing in `included` computed when `step` begins.

        Args:
            before: this rank's interrupted step; None if its sums are no longer valid.
        """
        self._interrupted = InterruptedStep(step, included, self._slices.count)
        if before is None:
            self._accumulator.clear()
        else:
            self._own_losses = before._own_losses

    def missing(self, step: int, micro_batches: int) -> frozenset[int]:
        """The micro-batches that some rank's sums lack when `step` begins."""
        if self._interrupted.step != step:
            return frozenset(range(micro_batches))
        return self._interrupted.missing(self._plan, micro_batches)

    def before_gradients(self, micro_batch: int) -> None:
        """Before a micro-batch's gradients, skip the parameters whose sums include them."""
        self._backwards += 1
        if self._backwards == self._half:
            self._at_half()
        skipped: dict[nn.Parameter, frozenset[int]] = {}
        if self._interrupted is not NOT_INTERRUPTED:
            skipped = {
                segment.parameter: self._skipped_units(segment, micro_batch)
                for segment in self._buffer.segments
            }
        self._accumulator.begin_gradients(micro_batch, skipped)

    def _skipped_units(self, segment: Segment, micro_batch: int) -> frozenset[int]:
        """The gradients of a micro-batch that a parameter's sums include, as the model numbers
        them: of slice q, q; where the rank adds p for each slice, q times p and on."""
        keys = self._keys(segment)
        return frozenset(
            slice_ * len(keys) + place
            for place, key in enumerate(keys)
            for slice_ in self._interrupted.slices_in(key, micro_batch)
        )

    def _keys(self, segment: Segment) -> list[ParameterKey]:
        """A segment's row, in each part that gives it a gradient."""
        parts = contributing_parts(segment.row, self._parts)
        return [(part, segment.layer, segment.row.index) for part in parts]

    def included(self, losses: Mapping[int, Tensor] | None) -> Included:
        """The units that each parameter's sums include, after an interruption.

        Args:
            losses: the losses by micro-batch, of the model's last chunk; None if another rank has
                it.
        """
        count, included = self._slices.count, {}
        for segment in self._buffer.segments:
            keys = self._keys(segment)
            added = self._accumulator.included.get(segment.parameter, ())
            for place, key in enumerate(keys):
                included[key] = frozenset(
                    micro_batch * count + unit // len(keys)
                    for micro_batch, unit in added
                    if unit % len(keys) == place
                )
        if losses is not None:
            known = {**losses, **self._own_losses}
            units = included[self._loss_key(self._parts[0])]
            self._own_losses = {
                m: loss
                for m, loss in known.items()
                if all(m * self._slices.count + number in units for number in self._slices.own)
            }
        return included

    def reported(self, losses: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The loss sums that only this rank reports, by micro-batch."""
        own = self._own_losses if self._interrupted is not NOT_INTERRUPTED else {}
        return own | {
            micro_batch: loss
            for micro_batch, loss in losses.items()
            if not self._interrupted.has(self._loss_key(0), micro_batch, self._slices.own)
        }

    def _loss_key(self, part: int) -> ParameterKey:
        """The parameter that decides which rank reports a loss: the head's first row."""
        return part, len(self._plan.layers) - 1, 0
