"""Orders with whole backwards: GPipe, 1F1B, interleaved 1F1B, and forward only.

Every function gives the compute actions of one pipeline index for local micro-batches 0..m-1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from holdfast.parallel.schedules.actions import Action, Op, Program
from holdfast.parallel.schedules.schedule import Schedule


def gpipe(index: int, pipeline: int, virtual: int, micro_batches: int) -> Program:
    """All forwards, then all backwards, chunk by chunk (Huang et al. 2019; Lamy-Poirier 2022)."""
    chunks = range(index, pipeline * virtual, pipeline)
    forwards = [Action(Op.FORWARD, c, m) for c in chunks for m in range(micro_batches)]
    backwards = [Action(Op.BACKWARD, c, m) for c in reversed(chunks) for m in range(micro_batches)]
    return (*forwards, *backwards)


def one_forward_one_backward(index: int, pipeline: int, micro_batches: int) -> Program:
    """1F1B (Narayanan et al. 2021, section 2.2): at most min(pipeline - index, m) in flight."""
    forwards = [Action(Op.FORWARD, index, m) for m in range(micro_batches)]
    backwards = [Action(Op.BACKWARD, index, m) for m in range(micro_batches)]
    return tuple(_alternate(forwards, backwards, pipeline - index - 1))


def interleaved(index: int, pipeline: int, virtual: int, micro_batches: int) -> Program:
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2) for any number of micro-batches.

    Micro-batches go through the chunks in groups of `pipeline`. The published warm-up deadlocks
    after a smaller group (Megatron and torch refuse such numbers). Here the remaining micro-batches
    join the groups, one each, if there are enough groups: at most one more micro-batch is then in
    flight, and the bubble stays that of full groups. Otherwise they form a smaller first group, in
    the order of a full one without the missing micro-batches: leaving actions out of a sound order
    keeps it sound.
    """
    if virtual == 1:
        return one_forward_one_backward(index, pipeline, micro_batches)
    rounds, left_over = divmod(micro_batches, pipeline)
    if left_over <= rounds:
        missing = 0
        sizes = [pipeline + (g < left_over) for g in range(rounds)]
    else:
        missing = pipeline - left_over
        sizes = [pipeline] * (rounds + 1)
    chunks = tuple(range(index, pipeline * virtual, pipeline))
    forwards = [Action(Op.FORWARD, c, m - missing) for c, m in _grouped(chunks, sizes)]
    backwards = [Action(Op.BACKWARD, c, m - missing) for c, m in _grouped(chunks[::-1], sizes)]
    warm_up = 2 * (pipeline - index - 1) + (virtual - 1) * sizes[0]
    return tuple(a for a in _alternate(forwards, backwards, warm_up) if a.micro_batch >= 0)


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


def _alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> Iterator[Action]:
    """`warm_up` forwards, then forward and backward in turn, then the remaining backwards."""
    warm_up = min(warm_up, len(forwards))
    yield from forwards[:warm_up]
    steady = len(forwards) - warm_up
    for forward, backward in zip(forwards[warm_up:], backwards[:steady], strict=True):
        yield forward
        yield backward
    yield from backwards[steady:]


GPIPE = Schedule(
    lambda pipeline, virtual, micro_batches: tuple(
        gpipe(index, pipeline, virtual, micro_batches) for index in range(pipeline)
    )
)
ONE_FORWARD_ONE_BACKWARD = Schedule(
    lambda pipeline, _, micro_batches: tuple(
        one_forward_one_backward(index, pipeline, micro_batches) for index in range(pipeline)
    ),
    chunks_per_rank=1,
    alternative="interleaved-1f1b",
)
INTERLEAVED = Schedule(
    lambda pipeline, virtual, micro_batches: tuple(
        interleaved(index, pipeline, virtual, micro_batches) for index in range(pipeline)
    )
)
