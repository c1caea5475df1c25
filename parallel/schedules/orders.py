"""Orders with whole backwards: GPipe, 1F1B, interleaved 1F1B, and forward only.

Every function gives the compute actions of one pipeline index for local micro-batches 0..m-1.

Sequences may pass the chunks in stretches, one after another. A stretch attends to those before it,
so forwards take them in their order and backwards in the reverse. A stage then begins with a
sequence as soon as its first stretch has left the stage before, and keeps fewer of them: the bubble
and the activations that wait for other stages are divided by the number of stretches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Protocol

from holdfast.parallel.schedules.actions import Action, Op, Program
from holdfast.parallel.schedules.schedule import Schedule


def in_stretches(program: Iterable[Action], stretches: int) -> Program:
    """The program with each action in stretches, without gaps. Pure.

    An order that was sound is sound: each stretch needs those before it, and its own from the
    neighbouring chunks, which come in the same order everywhere.

    Args:
        program: compute actions of whole sequences.
        stretches: 1: the program as it is.
    """
    if stretches == 1:
        return tuple(program)
    return tuple(part for action in program for part in _stretched(action, stretches))


def _stretched(action: Action, stretches: int) -> Iterator[Action]:
    numbers = range(stretches)
    for stretch in numbers if action.op is Op.FORWARD else reversed(numbers):
        yield replace(action, stretch=stretch)


def gpipe(
    index: int, pipeline: int, virtual: int, micro_batches: int, stretches: int = 1
) -> Program:
    """All forwards, then all backwards, chunk by chunk (Huang et al. 2019; Lamy-Poirier 2022).

    In stretches it is TeraPipe (Li et al. 2021).
    """
    chunks = range(index, pipeline * virtual, pipeline)
    forwards = [Action(Op.FORWARD, c, m) for c in chunks for m in range(micro_batches)]
    backwards = [Action(Op.BACKWARD, c, m) for c in reversed(chunks) for m in range(micro_batches)]
    return in_stretches((*forwards, *backwards), stretches)


def one_forward_one_backward(
    index: int, pipeline: int, micro_batches: int, stretches: int = 1
) -> Program:
    """1F1B (Narayanan et al. 2021, section 2.2): at most min(pipeline - index, m) in flight.

    In stretches at most stretches + pipeline - index - 1 of these, as in SlimPipe (Li et al. 2025).
    """
    forwards = [Action(Op.FORWARD, index, m) for m in range(micro_batches)]
    backwards = [Action(Op.BACKWARD, index, m) for m in range(micro_batches)]
    return _alternate(forwards, backwards, pipeline - index - 1, stretches)


def interleaved(
    index: int, pipeline: int, virtual: int, micro_batches: int, stretches: int = 1
) -> Program:
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2) for any number of micro-batches.

    Micro-batches go through the chunks in groups of `pipeline`, or of as many as have that many
    stretches. The published warm-up deadlocks after a smaller group (Megatron and torch refuse such
    numbers). Here the remaining micro-batches join the groups, one each, if there are enough
    groups: at most one more micro-batch is then in flight, and the bubble stays that of full
    groups. Otherwise they form a smaller first group, in the order of a full one without the
    missing micro-batches: leaving actions out of a sound order keeps it sound.
    """
    if virtual == 1:
        return one_forward_one_backward(index, pipeline, micro_batches, stretches)
    group = -(-pipeline // stretches)
    rounds, left_over = divmod(micro_batches, group)
    if left_over <= rounds:
        missing = 0
        sizes = [group + (g < left_over) for g in range(rounds)]
    else:
        missing = group - left_over
        sizes = [group] * (rounds + 1)
    chunks = tuple(range(index, pipeline * virtual, pipeline))
    forwards = [Action(Op.FORWARD, c, m - missing) for c, m in _grouped(chunks, sizes)]
    backwards = [Action(Op.BACKWARD, c, m - missing) for c, m in _grouped(chunks[::-1], sizes)]
    warm_up = 2 * (pipeline - index - 1) + (virtual - 1) * sizes[0] * stretches
    order = _alternate(forwards, backwards, warm_up, stretches)
    return tuple(action for action in order if action.micro_batch >= 0)


def forward_sequence(
    index: int, pipeline: int, placement: tuple[int, ...], micro_batches: int
) -> Program:
    """The forwards of one pipeline index, for evaluation.

    Args:
        placement: the pipeline index of each chunk.
    """
    chunks = tuple(c for c, holder in enumerate(placement) if holder == index)
    looped = all(holder == c % pipeline for c, holder in enumerate(placement))
    if looped:
        order = _grouped(chunks, [pipeline] * -(-micro_batches // pipeline))
    else:
        # V placement: starting chunk c of micro-batch m at time 2m + c never asks one rank for two
        # things at once, because its two chunks have different parity.
        order = iter(
            sorted(
                ((c, m) for c in chunks for m in range(micro_batches)),
                key=lambda at: 2 * at[1] + at[0],
            )
        )
    return tuple(Action(Op.FORWARD, c, m) for c, m in order if m < micro_batches)


def _grouped(chunks: tuple[int, ...], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = 0
    for size in sizes:
        for chunk in chunks:
            for micro_batch in range(first, first + size):
                yield chunk, micro_batch
        first += size


def _alternate(
    forwards: list[Action], backwards: list[Action], warm_up: int, stretches: int
) -> Program:
    """Some forwards, then forward and backward in turn, then the remaining backwards.

    Args:
        forwards, backwards: of whole sequences.
        warm_up: the forwards before, without those that the first backward of a sequence needs: all
            but one of its stretches.
    """
    ahead, behind = in_stretches(forwards, stretches), in_stretches(backwards, stretches)
    warm_up = min(warm_up + stretches - 1, len(ahead))
    steady = len(ahead) - warm_up
    turns = zip(ahead[warm_up:], behind[:steady], strict=True)
    return (*ahead[:warm_up], *chain.from_iterable(turns), *behind[steady:])


class _Programs(Protocol):
    def __call__(
        self, pipeline: int, virtual: int, micro_batches: int, stretches: int = 1, /
    ) -> tuple[Program, ...]: ...


def _of_all(order: Callable[[int, int, int, int, int], Program]) -> _Programs:
    """The programs of all pipeline indices."""

    def programs(
        pipeline: int, virtual: int, micro_batches: int, stretches: int = 1, /
    ) -> tuple[Program, ...]:
        return tuple(
            order(index, pipeline, virtual, micro_batches, stretches) for index in range(pipeline)
        )

    return programs


_GPIPE, _ALTERNATING = _of_all(gpipe), _of_all(interleaved)
GPIPE = Schedule(_GPIPE, stretched=_GPIPE)
ONE_FORWARD_ONE_BACKWARD = Schedule(
    _ALTERNATING, stretched=_ALTERNATING, chunks_per_rank=1, alternative="interleaved-1f1b"
)
INTERLEAVED = Schedule(_ALTERNATING, stretched=_ALTERNATING)
