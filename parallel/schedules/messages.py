"""The messages between the ranks that compute neighbouring chunks of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from holdfast.parallel.schedules.actions import Action, Op, Program

PeersOf = Callable[[Op, int, int], Sequence[int]]
"""(message, chunk, micro-batch) -> the ranks of a neighbouring chunk that a rank sends that message
to, or receives it from; none if the rank computes that chunk itself."""
_FORWARD = (Op.RECEIVE_FORWARD, Op.SEND_FORWARD, 1)
_BACKWARD = (Op.RECEIVE_BACKWARD, Op.SEND_BACKWARD, -1)


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

    def peers_of(rank: int) -> PeersOf:
        def owner(_: Op, chunk: int, micro_batch: int) -> tuple[int, ...]:
            found = owner_of(chunk, micro_batch)
            return () if found == rank else (found,)

        return owner

    return {
        rank: program_with_messages(program, peers_of(rank), chunks=chunks)
        for rank, program in programs.items()
    }


def program_with_messages(program: Program, peers_of: PeersOf, *, chunks: int) -> Program:
    """One rank's program with its messages, as `with_messages` places them. Pure.

    Args:
        program: the rank's compute actions; those with a negative micro-batch have no messages.
        peers_of: the ranks that it exchanges a message with; see `PeersOf`.
        chunks: the number of chunks of the whole model.
    """

    def messages(op: Op, action: Action, neighbour: int) -> list[Action]:
        if not 0 <= neighbour < chunks:
            return []
        peers = peers_of(op, neighbour, action.micro_batch)
        chunk, micro_batch, stretch = action.key
        return [Action(op, chunk, micro_batch, peer, stretch) for peer in peers]

    complete: list[Action] = []
    for action in program:
        chunk, op = action.chunk, action.op
        if op is Op.BACKWARD_WEIGHT or action.micro_batch < 0:
            complete.append(action)
            continue
        comes, goes, onward = _FORWARD if op is Op.FORWARD else _BACKWARD
        complete += messages(comes, action, chunk - onward)
        complete.append(action)
        complete += messages(goes, action, chunk + onward)
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
    chunk, micro_batch, stretch = send.key
    if send.op is Op.SEND_FORWARD:
        return Action(Op.RECEIVE_FORWARD, chunk + 1, micro_batch, sender, stretch)
    return Action(Op.RECEIVE_BACKWARD, chunk - 1, micro_batch, sender, stretch)
