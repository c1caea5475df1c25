"""The step in flight on one rank: the gradients that its sums include, and those it skips.

An interrupted step is resumed: parameters whose sums include a micro-batch skip its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from torch import nn

from holdfast.parallel.layout import LostGradient, Slices, contributing_parts
from holdfast.parallel.optimizer import Segment
from holdfast.parallel.pipeline import ExpertInputs, ExpertTeam, TokensKey
from holdfast.parallel.plan import Plan
from holdfast.parallel.schedules import Action, Op
from holdfast.trainer.step.construction import ModelParts
from holdfast.trainer.step.micro_batches import (
    NOT_INTERRUPTED,
    Included,
    Inputs,
    InterruptedStep,
    ParameterKey,
    RankInputs,
)
from holdfast.trainer.step.vote import (
    Losses,
    Notes,
    SliceLosses,
    by_slice,
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
        team: ExpertTeam | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            program: this rank's actions of a whole step.
            step: the next step, counted from 0, or the one interrupted under the plan before.
            team: keeps what this rank's tokens bring to experts; None: nothing does.
        """
        self.step = step
        self._plan, self._buffer, self._accumulator = plan, model.buffer, model.accumulator
        self._rank = rank
        self._team = team
        self._interrupted = NOT_INTERRUPTED
        self._own_losses: SliceLosses = {}
        """The loss sums of an interrupted step that this rank reports again."""
        self._own_notes = Notes()
        """The notes of layers in an interrupted step that this rank reports again."""
        self._backwards = 0
        self._half = max(1, sum(action.op in _BACKWARDS for action in program) // 2)
        self._before: Callable[[bool], None] = lambda half: None

    @property
    def _slices(self) -> Slices:
        return self._accumulator.slices

    @property
    def _inputs(self) -> ExpertInputs | None:
        return None if self._team is None else self._team.inputs

    def begin(
        self,
        step: int,
        before: Callable[[bool], None] = lambda half: None,
    ) -> bool:
        """Begin `step`. Returns whether it is an interrupted step whose sums continue.

        Args:
            before: called before each micro-batch's gradients; half of a whole step's backward
                passes have begun with them, or not.
        """
        self.step, self._backwards, self._before = step, 0, before
        if self._inputs is not None:
            self._inputs.begin(step)
        if self._interrupted.step == step:
            self._accumulator.skip(self._skipped())
            return True
        self._interrupted = NOT_INTERRUPTED
        self._own_losses, self._own_notes = {}, Notes()
        self._accumulator.clear()
        return False

    def resumes(self, step: int) -> bool:
        """Whether the sums of an interrupted step are continued when `step` begins."""
        return self._interrupted.step == step

    def release(self) -> None:
        """Free the memory of the sums and of inputs until `begin`, and forget them."""
        self._accumulator.release()
        self._forget_inputs()

    def _forget_inputs(self) -> None:
        if self._inputs is not None:
            self._inputs.clear()

    def resume(
        self,
        step: int,
        included: Included,
        before: StepInFlight | None,
        inputs: Mapping[int, Inputs] | None = None,
    ) -> None:
        """Have only what is missing in `included` computed when `step` begins.

        Args:
            before: this rank's interrupted step, whose parts of the parameters this one has as
                well; None if its sums are no longer valid.
            inputs: those from which lost gradients of experts are computed; see `InterruptedStep`.
        """
        self._interrupted = InterruptedStep(step, included, self._slices.count, inputs or {})
        if before is None:
            self._accumulator.clear()
            self._forget_inputs()
            return
        self._own_losses, self._own_notes = before._own_losses, before._own_notes
        if before._accumulator is not self._accumulator:
            self._accumulator.take_over(before._accumulator, self._same_segments(before))

    def _same_segments(
        self, before: StepInFlight
    ) -> Iterator[tuple[Segment, Segment, Callable[[int], int]]]:
        """The segments that both steps have, and the numbers of their gradients."""
        there = {segment.elements: segment for segment in before._buffer.segments}
        for segment in self._buffer.segments:
            old = there.get(segment.elements)
            if old is not None:
                keys, old_keys = self._keys(segment), before._keys(old)
                places = [keys.index(key) for key in old_keys]
                yield segment, old, partial(_unit_here, len(keys), places)

    def missing(self, step: int, micro_batches: int) -> frozenset[int]:
        """The micro-batches that some rank's sums lack when `step` begins."""
        if self._interrupted.step != step:
            return frozenset(range(micro_batches))
        return self._interrupted.missing(self._plan, micro_batches)

    def lost_gradients(self, repeated: frozenset[int]) -> list[LostGradient]:
        """The gradients of experts that this rank's team computes from inputs in this step.

        Args:
            repeated: the result of `missing`.
        """
        return self._interrupted.lost_gradients(self._plan, self._rank, repeated)

    def before_gradients(self, micro_batch: int) -> None:
        """Note that a micro-batch's gradients follow."""
        self._backwards += 1
        self._before(self._backwards == self._half)
        self._accumulator.begin_gradients(micro_batch)

    def _skipped(self) -> dict[nn.Parameter, set[tuple[int, int]]]:
        """The gradients that each parameter's sums include, as the model numbers them: of slice q,
        q; where the rank adds p for each slice, q times p and on."""
        found: dict[nn.Parameter, set[tuple[int, int]]] = {}
        for segment in self._buffer.segments:
            keys = self._keys(segment)
            found[segment.parameter] = {
                (unit // self._slices.count, unit % self._slices.count * len(keys) + place)
                for place, key in enumerate(keys)
                for unit in self._interrupted.included.get(key, ())
            }
        return found

    def _keys(self, segment: Segment) -> list[ParameterKey]:
        """A segment's row, in each part that gives it a gradient."""
        parts = contributing_parts(segment.row, self._plan.parts_of(self._rank))
        return [(part, segment.layer, segment.row.index) for part in parts]

    def included(self, losses: Losses | None, notes: Notes | None = None) -> Included:
        """The units that each parameter's sums include, after an interruption.

        Args:
            losses: those of the model's last chunk; None if another rank has it.
            notes: those of layers here; None: there are none.
        """
        count, included = self._slices.count, dict[ParameterKey, frozenset[int]]()
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
            known = by_slice(losses, self._slices, self._plan.stretches) | self._own_losses
            units = included.get(self._loss_key, ())
            self._own_losses = {
                (micro_batch, number): loss
                for (micro_batch, number), loss in known.items()
                if micro_batch * count + number in units
            }
        self._own_notes = (
            (notes or Notes())
            .and_of(self._own_notes)
            .only(
                lambda key: key.micro_batch * count + key.number in included.get(_note_key(key), ())
            )
        )
        return included

    def kept_inputs(self) -> RankInputs:
        """The units whose inputs of experts, of all layers here, are kept."""
        if self._team is None or self._team.inputs is None:
            return {}
        count, layers = self._slices.count, sum(map(bool, self._team.hosts.values()))
        return {
            share: [micro_batch * count + number for micro_batch, number in keys]
            for share, keys in self._team.inputs.whole(self.step, layers).items()
        }

    def reported_notes(self, notes: Notes) -> Notes:
        """The notes of layers that only this rank reports."""
        own = self._own_notes if self._interrupted is not NOT_INTERRUPTED else Notes()
        return own.and_of(
            notes.only(
                lambda key: (
                    key.number not in self._interrupted.slices_in(_note_key(key), key.micro_batch)
                )
            )
        )

    def reported(self, losses: Losses) -> SliceLosses:
        """The loss sums that only this rank reports."""
        own = self._own_losses if self._interrupted is not NOT_INTERRUPTED else {}
        return own | {
            (micro_batch, number): loss
            for (micro_batch, number), loss in by_slice(
                losses, self._slices, self._plan.stretches
            ).items()
            if number not in self._interrupted.slices_in(self._loss_key, micro_batch)
        }

    @property
    def _loss_key(self) -> ParameterKey:
        """The parameter that decides which rank reports a loss: the head's first row."""
        return 0, len(self._plan.layers) - 1, 0


def _note_key(key: TokensKey) -> ParameterKey:
    """The parameter that decides which rank reports a note: the layer's first row."""
    return key.part, key.layer, 0


def _unit_here(parts: int, places: Sequence[int], unit: int) -> int:
    """The number of a gradient where a slice has `parts` of them, those before at `places`."""
    slice_, place = divmod(unit, len(places))
    return slice_ * parts + places[place]
