"""The messages between the ranks that compute neighbouring chunks of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast.parallel.schedules.actions import Action, Op, Program


def with_messages(
    programs: Mapping[int, Program],
    owner_of: Callable[[int, int], int],
    *,
    chunks: int | None = None,
) -> dict[int, Program]:
    """The programs with a send right after each value is made and a receive right before its use.

    Args:
        programs: the compute actions by rank.
        owner_of: (chunk, micro-batch) -> the rank that computes it. Micro-batches of a chunk may
            have different ranks. Neighbouring chunks on one rank need no message.
        chunks: the number of chunks of the whole model; None takes the highest chunk of `programs`,
            which is right if they have every rank.
    Returns:
        The complete programs by rank.
    """
    if chunks is None:
        chunks = 1 + max((a.chunk for p in programs.values() for a in p), default=-1)
    return {
        rank: _rank_with_messages(rank, program, owner_of, chunks - 1)
        for rank, program in programs.items()
    }


def _rank_with_messages(
    rank: int, program: Program, owner_of: Callable[[int, int], int], last: int
) -> Program:
    complete: list[Action] = []
    for action in program:
        chunk, micro_batch, op = action.chunk, action.micro_batch, action.op
        if op is Op.BACKWARD_WEIGHT:
            complete.append(action)
            continue
        before = owner_of(chunk - 1, micro_batch) if chunk > 0 else rank
        after = owner_of(chunk + 1, micro_batch) if chunk < last else rank
        if op is Op.FORWARD:
            if before != rank:
                complete.append(Action(Op.RECEIVE_FORWARD, chunk, micro_batch, before))
            complete.append(action)
            if after != rank:
                complete.append(Action(Op.SEND_FORWARD, chunk, micro_batch, after))
        else:
            if after != rank:
                complete.append(Action(Op.RECEIVE_BACKWARD, chunk, micro_batch, after))
            complete.append(action)
            if before != rank:
                complete.append(Action(Op.SEND_BACKWARD, chunk, micro_batch, before))
    return tuple(complete)


def owners(programs: Mapping[int, Program]) -> dict[tuple[int, int], int]:
    """(chunk, micro-batch) -> the rank that computes its forward."""
    return {
        (action.chunk, action.micro_batch): rank
        for rank, program in programs.items()
        for action in program
        if action.op is Op.FORWARD
    }


def matching_receive(send: Action, sender: int) -> Action:
    """The receive at the other end: the output of chunk c is the input of chunk c + 1."""
    if send.op is Op.SEND_FORWARD:
        return Action(Op.RECEIVE_FORWARD, send.chunk + 1, send.micro_batch, sender)
    return Action(Op.RECEIVE_BACKWARD, send.chunk - 1, send.micro_batch, sender)
