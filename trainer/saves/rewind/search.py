"""The search for the samples that cause a spike. Collective over all ranks; exact-mode safe.

Of each step that can be taken back, the newest first, every micro-batch is computed by itself: its
part in the loss, and the norm of its gradient. The sum of a step without a micro-batch is its total
minus that part, exactly, but the tokens that the mean is taken over change with a sample, and the
steps after it with its update. So the answer is not derived but tried: the steps are trained again
without the sample, from the state before them, and it is the cause if there is no spike then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from holdfast.trainer.data import Dataset
from holdfast.trainer.step import Outcome, Training

_MOST_SAMPLES = 4
"""The samples of one step that are suspected at most."""
_STANDS_OUT = 2.0
"""A micro-batch is suspected beside the first if it is this many times the usual."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of a step adds to it."""

    loss: float
    """Its part in the loss of the step."""
    grad_norm: float
    """The norm of its gradient."""


@dataclass(frozen=True, slots=True)
class Culprit:
    """The samples that cause a spike. Equal on all ranks."""

    step: int
    """The step that reads them, counted from 0."""
    micro_batches: tuple[int, ...]
    """Of each, the micro-batch."""
    places: tuple[int, ...]
    """Of each, its place in the order of the run."""
    samples: tuple[int, ...]
    """Of each, its number."""
    loss: float
    """The loss of the step with the spike without them."""


def find_culprit(training: Training, step: int) -> Culprit | None:
    """The samples without which a step, counted from 0, is no spike; None: none are found.

    The state is as before then.

    Args:
        step: the last one that was decided.
    """
    if not training.history.steps:
        return None
    with training.trial():
        for suspect in reversed(training.history.steps):
            if found := Suspicion(training, suspect, step).culprit():
                return found
    return None


def suspects(parts: Mapping[int, Part]) -> list[int]:
    """The parts that may be the cause: the one that stands out most, and others that do. Pure.

    A part stands out by its loss or its norm, over those that at least half of the parts have.
    """
    losses = median_low(part.loss for part in parts.values())
    norms = median_low(part.grad_norm for part in parts.values())
    sizes = {
        number: max(_ratio(part.loss, losses), _ratio(part.grad_norm, norms))
        for number, part in parts.items()
    }
    ordered = sorted(parts, key=lambda number: (-sizes[number], number))
    first, *others = ordered[:_MOST_SAMPLES]
    return [first, *(number for number in others if sizes[number] >= _STANDS_OUT)]


def _ratio(value: float, usual: float) -> float:
    return value / usual if usual > 0 else value


class Suspicion:
    """The suspicion that a step has samples that cause the spike of the same or a later step."""

    def __init__(self, training: Training, suspect: int, last: int) -> None:
        """Nothing is computed yet.

        Args:
            suspect: the step with the samples, counted from 0.
            last: the step with the spike.
        """
        self._training, self._suspect, self._last = training, suspect, last
        self._data, train = training.data, training.config.train
        self._first, self._size = train.samples_before(suspect), train.micro_batch
        self._micro_batches = train.batch_of(suspect) // train.micro_batch

    def culprit(self) -> Culprit | None:
        """The samples, if the spike is gone without them."""
        self._go_back()
        parts = {m: self._part(m, ()) for m in range(self._micro_batches)}
        tried: list[int] = []
        for micro_batch in suspects(parts):
            tried.append(self._largest(micro_batch))
            loss = self._loss_without(tried)
            if loss is not None:
                return self._fewest(tried, loss)
        return None

    def _largest(self, micro_batch: int) -> int:
        """The place, in the order of the run, of the sample that adds most to a micro-batch."""
        first = self._first + micro_batch * self._size
        places = range(first, first + self._size)
        if self._size == 1:
            return first
        self._go_back()
        parts = {place: self._part(micro_batch, set(places) - {place}) for place in places}
        return suspects(parts)[0]

    def _fewest(self, tried: Sequence[int], loss: float) -> Culprit:
        """The culprit, without samples that turn out to be innocent."""
        guilty = list(tried)
        for place in tried[:-1]:
            others = [other for other in guilty if other != place]
            without = self._loss_without(others)
            if without is not None:
                guilty, loss = others, without
        return Culprit(
            self._suspect,
            tuple((place - self._first) // self._size for place in guilty),
            tuple(guilty),
            self._numbers(guilty),
            loss,
        )

    def _part(self, micro_batch: int, empty: Collection[int]) -> Part:
        """What a micro-batch adds without the samples at some places."""
        training = self._training
        training.data = self._without(empty)
        training.compute(self._suspect, only=frozenset({micro_batch}))
        outcome = training.vote(*training.reduce())
        return Part(outcome.loss, outcome.grad_norm)

    def _loss_without(self, places: Collection[int]) -> float | None:
        """The loss of the step with the spike without some samples; None: it still is one."""
        training = self._training
        self._go_back()
        training.data = self._without(places)
        outcome: Outcome | None = None
        for step in range(self._suspect, self._last + 1):
            training.compute(step)
            outcome = training.vote(*training.reduce())
            training.apply(training.config.rate_of(step))
            if not outcome.usable:
                return None
        return None if outcome is None else outcome.loss

    def _go_back(self) -> None:
        self._training.finish_gather()
        self._training.take_back(self._suspect)
        self._training.gather_again()

    def _without(self, places: Collection[int]) -> Dataset:
        return self._data.without([(self._first, self._numbers(places))])

    def _numbers(self, places: Collection[int]) -> tuple[int, ...]:
        return tuple(self._data.numbers(place, 1)[0] for place in places)
