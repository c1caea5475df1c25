"""Orders that split the backward to fill the bubble: ZB-H1 and ZB-V (Qi et al. 2024).

Other stages wait for the input gradient (I); the weight gradient (W) runs when a rank would be
idle. Chunk 0 sends no input gradient, so its I and W are joined to a whole backward (B) if they are
adjacent, which is cheaper and delays no other rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from holdfast.parallel.schedules.actions import Action, Op, Program
from holdfast.parallel.schedules.list_scheduler import list_schedule
from holdfast.parallel.schedules.schedule import Schedule


def zb_h1(index: int, pipeline: int, micro_batches: int) -> Program:
    """ZB-H1 (Qi et al. 2024, section 2.2): 1F1B's activations, about a third of its bubble.

    Each W comes `index` micro-batches after its I. So every rank keeps at most `pipeline`
    micro-batches until their W, as many as 1F1B keeps on its first rank.
    """
    warm_up = min(pipeline - index - 1, micro_batches)
    lag = index
    order = [Action(Op.FORWARD, index, m) for m in range(warm_up)]
    for done in range(micro_batches):
        if warm_up + done < micro_batches:
            order.append(Action(Op.FORWARD, index, warm_up + done))
        order.append(Action(Op.BACKWARD_INPUT, index, done))
        if done >= lag:
            order.append(Action(Op.BACKWARD_WEIGHT, index, done - lag))
    late = range(max(0, micro_batches - lag), micro_batches)
    order += [Action(Op.BACKWARD_WEIGHT, index, m) for m in late]
    return tuple(_joined(order))


def v_placement(pipeline: int) -> tuple[int, ...]:
    """The pipeline index of every chunk: down the pipeline and back up; index 0 has both ends."""
    return (*range(pipeline), *reversed(range(pipeline)))


def zb_v(pipeline: int, micro_batches: int) -> tuple[Program, ...]:
    """ZB-V (Qi et al. 2024, section 6): two chunks per rank placed as a V, no bubble but the start.

    The published order needs 2 * pipeline - 1 micro-batches. Fewer are list-scheduled with the same
    limit of 2 * pipeline chunk activations, which is better than leaving the missing ones out.

    Returns:
        One program per pipeline index.
    """
    if micro_batches >= 2 * pipeline - 1:
        return tuple(_zb_v_order(index, pipeline, micro_batches) for index in range(pipeline))
    placed = v_placement(pipeline)
    programs = list_schedule(
        2 * pipeline,
        range(micro_batches),
        lambda chunk, _: placed[chunk],
        lambda action: 2.0 if action.op is Op.BACKWARD else 1.0,
        cap=2 * pipeline,
        split_backward=True,
    )
    return tuple(programs[index] for index in range(pipeline))


def _zb_v_order(index: int, pipeline: int, micro_batches: int) -> Program:
    steps = _VOrder(index, 2 * pipeline - 1 - index)
    for _ in range(2 * (pipeline - index) - 1):
        steps.forward(0)
    for _ in range(index):
        steps.forward(1)
        steps.forward(0)
    for _ in range(pipeline - index):
        steps.forward(1)
        steps.backward(1)
    while steps.forwards[1] < micro_batches:
        if steps.forwards[0] < micro_batches:
            steps.forward(0)
        steps.backward(0)
        steps.forward(1)
        steps.backward(1)
    for _ in range(index):
        steps.input(0)
        steps.input(1)
    for _ in range(pipeline - index):
        steps.input(0)
        steps.weight(0)
    for half in (1, 0):
        while steps.weights[half] < micro_batches:
            steps.weight(half)
    return tuple(_joined(steps.order))


class _VOrder:
    """The actions of one rank's two chunks, with a count of the micro-batches of each."""

    def __init__(self, descending_chunk: int, ascending_chunk: int) -> None:
        self.order: list[Action] = []
        self.forwards, self.inputs, self.weights = [0, 0], [0, 0], [0, 0]
        self._chunks = (descending_chunk, ascending_chunk)

    def forward(self, half: int) -> None:
        self._add(Op.FORWARD, half, self.forwards)

    def input(self, half: int) -> None:
        self._add(Op.BACKWARD_INPUT, half, self.inputs)

    def weight(self, half: int) -> None:
        self._add(Op.BACKWARD_WEIGHT, half, self.weights)

    def backward(self, half: int) -> None:
        self.input(half)
        self.weight(half)

    def _add(self, op: Op, half: int, counts: list[int]) -> None:
        self.order.append(Action(op, self._chunks[half], counts[half]))
        counts[half] += 1


def _joined(order: Sequence[Action]) -> Iterator[Action]:
    skip = False
    for place, action in enumerate(order):
        if skip:
            skip = False
            continue
        weight = Action(Op.BACKWARD_WEIGHT, action.chunk, action.micro_batch)
        skip = (
            action.op is Op.BACKWARD_INPUT
            and action.chunk == 0
            and place + 1 < len(order)
            and order[place + 1] == weight
        )
        yield Action(Op.BACKWARD, action.chunk, action.micro_batch) if skip else action


ZB_H1 = Schedule(
    lambda pipeline, _, micro_batches: tuple(
        zb_h1(index, pipeline, micro_batches) for index in range(pipeline)
    ),
    chunks_per_rank=1,
    alternative="zb-v with parallel.virtual = 2",
)
ZB_V = Schedule(
    lambda pipeline, _, micro_batches: zb_v(pipeline, micro_batches),
    chunks_per_rank=2,
    alternative="zb-h1 with parallel.virtual = 1",
    placement=lambda pipeline, _: v_placement(pipeline),
)
