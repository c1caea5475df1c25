"""Checks that programs compute a step: nothing missing, doubled, misplaced, unmatched or stuck."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise, product

from holdfast.parallel.errors import ScheduleError
from holdfast.parallel.schedules.actions import (
    COMPUTE,
    RECEIVED_AS,
    Action,
    Op,
    Program,
    peak_in_flight,
)
from holdfast.parallel.schedules.simulator import simulate

_Place = tuple[int, int]
"""Rank and position in its program."""
_Places = Mapping[tuple[Op, int, str], _Place]
"""By kind of action, chunk and `Action.label`."""


def check_programs(
    programs: Mapping[int, Program],
    chunks: int,
    micro_batches: Collection[int],
    *,
    stretches: int = 1,
    forward_only: bool = False,
    cap: Mapping[int, int] | int | None = None,
) -> None:
    """Check programs with messages, of all ranks that communicate.

    The check proves the following. Every micro-batch passes every chunk forward once and, after its
    forward and on the same rank, backward once (B, or I then W), in chunk order. Every value that
    crosses ranks has exactly one send after it is made and one receive before it is used, each
    naming the other's rank. Nothing else is sent. The stretches of a micro-batch go forward through
    a chunk in their order on one rank, and backward in the reverse. The programs end when receives
    block and sends do not.

    Args:
        programs: the programs by rank.
        chunks: the number of chunks of the whole model.
        micro_batches: the ids that the programs compute.
        stretches: the parts in which sequences pass the chunks.
        forward_only: whether the programs are for evaluation and have no backward.
        cap: the most chunk activations that a rank may keep until their B or W, for all ranks or by
            rank.
    Raises:
        ScheduleError: a check fails; the message names the rank, the position and the action of the
            first problem.
    """
    of_each = [""] if stretches == 1 else [f".{stretch}" for stretch in range(stretches)]
    labels = [f"{micro_batch}{part}" for micro_batch in micro_batches for part in of_each]
    places = _index(programs, chunks, frozenset(labels), forward_only)
    pairs = [(chunk, label) for chunk in range(chunks) for label in labels]
    for chunk, label in pairs:
        _check_compute(places, chunk, label, forward_only)
    for chunk, micro_batch in product(range(chunks), micro_batches):
        _check_stretches(places, chunk, [f"{micro_batch}{part}" for part in of_each], forward_only)
    for rank, program in programs.items():
        for position, action in enumerate(program):
            if action.op not in COMPUTE:
                _check_address(places, rank, position, action)
    for chunk, label in pairs:
        if chunk > 0:
            _check_flow(places, Op.FORWARD, chunk - 1, chunk, label)
            if not forward_only:
                _check_flow(places, Op.BACKWARD, chunk, chunk - 1, label)
    simulate(programs, lambda action: 1.0)
    for rank, program in programs.items():
        limit = cap.get(rank) if isinstance(cap, Mapping) else cap
        peak = peak_in_flight(program, until="weight")
        if limit is not None and peak > limit:
            raise ScheduleError(
                f"rank {rank} keeps {int(peak)} chunk activations at once, {limit} are allowed; "
                "run backwards earlier, or allow more"
            )


def _index(
    programs: Mapping[int, Program], chunks: int, known: frozenset[str], forward_only: bool
) -> dict[tuple[Op, int, str], _Place]:
    """The place of each action; every action is in range and occurs once."""
    places: dict[tuple[Op, int, str], _Place] = {}
    for rank, program in programs.items():
        for position, action in enumerate(program):
            key = (action.op, action.chunk, action.label)
            if not 0 <= action.chunk < chunks:
                wrong = f"there is no such chunk, chunks are 0..{chunks - 1}"
            elif action.label not in known:
                wrong = "this is no micro-batch of the step, or stretch of one"
            elif (action.peer is None) != (action.op in COMPUTE):
                wrong = "messages need a peer, and compute actions have none"
            elif forward_only and action.op not in _FORWARD_OPS:
                wrong = "a backward in a forward-only program"
            elif key in places:
                wrong = f"is there already, at {_where(places[key])}"
            else:
                places[key] = (rank, position)
                continue
            raise ScheduleError(f"{_at((rank, position), action)}: {wrong}")
    return places


_FORWARD_OPS = frozenset({Op.FORWARD, Op.SEND_FORWARD, Op.RECEIVE_FORWARD})


def _check_compute(places: _Places, chunk: int, label: str, forward_only: bool) -> None:
    """Check for one forward, then one backward on the same rank."""
    forward = places.get((Op.FORWARD, chunk, label))
    if forward is None:
        raise ScheduleError(f"no rank computes {_name(Op.FORWARD, chunk, label)}")
    if forward_only:
        return
    whole, split, weight = (
        places.get((op, chunk, label))
        for op in (Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
    )
    for extra, op in ((split, Op.BACKWARD_INPUT), (weight, Op.BACKWARD_WEIGHT)):
        if whole is not None and extra is not None:
            again = _at(extra, _name(op, chunk, label))
            raise ScheduleError(f"{again}: the whole backward is there too, at {_where(whole)}")
    if whole is None and (split is None or weight is None):
        missing = "B" if split is None and weight is None else "I" if split is None else "W"
        raise ScheduleError(
            f"no rank computes {chunk}{missing}{label}, whose forward is at {_where(forward)}"
        )
    place = whole if split is None else split
    assert place is not None
    sequence = [
        (Op.FORWARD, forward),
        (Op.BACKWARD if split is None else Op.BACKWARD_INPUT, place),
    ]
    if weight is not None:
        sequence.append((Op.BACKWARD_WEIGHT, weight))
    for (first, before), (second, after) in pairwise(sequence):
        if after[0] != before[0]:
            raise ScheduleError(
                f"{_at(after, _name(second, chunk, label))}: "
                f"{_name(first, chunk, label)} is on another rank, at {_where(before)}"
            )
        _check_order((first, chunk), before, (second, chunk), after, label)


def _check_stretches(
    places: _Places, chunk: int, labels: Sequence[str], forward_only: bool
) -> None:
    """Check that the stretches of a micro-batch pass a chunk in order, on one rank."""
    for before, after in pairwise(labels):
        forwards = [_computed(places, Op.FORWARD, chunk, label) for label in (before, after)]
        _check_in_turn(chunk, (before, *forwards[0]), (after, *forwards[1]))
        if not forward_only:
            backwards = [_computed(places, Op.BACKWARD, chunk, label) for label in (after, before)]
            _check_in_turn(chunk, (after, *backwards[0]), (before, *backwards[1]))


def _check_in_turn(
    chunk: int, first: tuple[str, Op, _Place], second: tuple[str, Op, _Place]
) -> None:
    """Check that two stretches pass a chunk on one rank, the first before the second."""
    (label, op, before), (next_label, next_op, after) = first, second
    if before[0] != after[0] or before[1] > after[1]:
        raise ScheduleError(
            f"{_at(after, _name(next_op, chunk, next_label))}: "
            f"{_name(op, chunk, label)} must come before it on the same rank; it is at "
            f"{_where(before)}"
        )


def _check_address(places: _Places, rank: int, position: int, action: Action) -> None:
    """Check that a message goes between the ranks of its two chunks, and that these differ."""
    neighbour = action.chunk + (1 if action.op in (Op.SEND_FORWARD, Op.RECEIVE_BACKWARD) else -1)
    own = places[Op.FORWARD, action.chunk, action.label][0]
    other = places.get((Op.FORWARD, neighbour, action.label))
    if other is None:
        wrong = f"there is no chunk {neighbour} to exchange it with"
    elif own != rank:
        wrong = f"this chunk of the micro-batch is computed by rank {own}"
    elif other[0] == rank:
        wrong = "both chunks are on this rank and need no message"
    elif other[0] != action.peer:
        wrong = f"the peer must be rank {other[0]}, which computes {neighbour}F{action.label}"
    else:
        return
    raise ScheduleError(f"{_at((rank, position), action)}: {wrong}")


def _check_flow(places: _Places, direction: Op, source: int, target: int, label: str) -> None:
    """Check that a value is made, sent, received and used, in this order."""
    made_op, made = _computed(places, direction, source, label)
    used_op, used = _computed(places, direction, target, label)
    if made[0] == used[0]:
        _check_order((made_op, source), made, (used_op, target), used, label)
        return
    send = Op.SEND_FORWARD if direction is Op.FORWARD else Op.SEND_BACKWARD
    receive = RECEIVED_AS[send]
    sent = places.get((send, source, label))
    received = places.get((receive, target, label))
    for place, op, chunk, near_op, near in (
        (sent, send, source, made_op, made),
        (received, receive, target, used_op, used),
    ):
        if place is None:
            raise ScheduleError(
                f"{_at(near, _name(near_op, chunk, label))}: its "
                f"{_name(op, chunk, label)} is missing, though the neighbouring chunk is on "
                "another rank"
            )
    assert sent is not None
    assert received is not None
    _check_order((made_op, source), made, (send, source), sent, label)
    _check_order((receive, target), received, (used_op, target), used, label)


def _check_order(
    first: tuple[Op, int], before: _Place, second: tuple[Op, int], after: _Place, label: str
) -> None:
    """Check that two actions of one rank, given as (op, chunk), come in this order."""
    if before[1] > after[1]:
        raise ScheduleError(
            f"{_at(after, _name(*second, label))}: comes before "
            f"{_name(*first, label)} at {_where(before)}, which it needs"
        )


def _computed(places: _Places, direction: Op, chunk: int, label: str) -> tuple[Op, _Place]:
    place = places.get((direction, chunk, label))
    if place is not None:
        return direction, place
    return Op.BACKWARD_INPUT, places[Op.BACKWARD_INPUT, chunk, label]


def _where(place: _Place) -> str:
    return f"rank {place[0]}, position {place[1]}"


def _name(op: Op, chunk: int, label: str) -> str:
    return f"{chunk}{op.value}{label}"


def _at(place: _Place, action: Action | str) -> str:
    return f"{_where(place)}, {action}"
