"""The actions of a rank, and the text form of programs.

A program is the ordered list of one rank's actions of one step. Programs are data: the other
modules of this package generate, check, simulate and print them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from holdfast.parallel.errors import ScheduleError


class Op(StrEnum):
    """The kinds of action; the values are the notation of torch.distributed.pipelining."""

    FORWARD = "F"
    BACKWARD = "B"
    """Input and weight gradients in one pass."""
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_FORWARD = "SEND_F"
    """Send the chunk's output to the rank that computes the next chunk of this micro-batch."""
    RECEIVE_FORWARD = "RECV_F"
    """Receive the input of the chunk."""
    SEND_BACKWARD = "SEND_B"
    """Send the gradient of the chunk's input to the rank that computed the previous chunk."""
    RECEIVE_BACKWARD = "RECV_B"
    """Receive the gradient of the chunk's output."""


COMPUTE = frozenset({Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT})
RECEIVED_AS = {Op.SEND_FORWARD: Op.RECEIVE_FORWARD, Op.SEND_BACKWARD: Op.RECEIVE_BACKWARD}
SENDS = frozenset(RECEIVED_AS)
RECEIVES = frozenset(RECEIVED_AS.values())

_TEXT = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|B|I|W)(\d+)(?:\.(\d+))?(?:([<>])(\d+))?")

ActionKey = tuple[int, int, int | None]
"""Chunk, micro-batch and stretch: what passes a chunk at once."""


@dataclass(frozen=True, slots=True)
class Action:
    """One action: `2F0` is chunk 2's forward for micro-batch 0, `2SEND_F0>1` sends it to rank 1.

    `2F0.3` is that of stretch 3 of micro-batch 0.
    """

    op: Op
    chunk: int
    micro_batch: int
    peer: int | None = None
    """The rank at the other end; None for compute actions."""
    stretch: int | None = None
    """Which of the equal parts of its sequences; None: they pass the chunks as a whole."""

    @property
    def key(self) -> ActionKey:
        """What passes the chunk."""
        return self.chunk, self.micro_batch, self.stretch

    @property
    def label(self) -> str:
        """What passes the chunk, but for the chunk: the micro-batch, or a stretch of it."""
        return f"{self.micro_batch}" + ("" if self.stretch is None else f".{self.stretch}")

    def __str__(self) -> str:
        text = f"{self.chunk}{self.op.value}{self.label}"
        if self.peer is None:
            return text
        return f"{text}{'<' if self.op in RECEIVES else '>'}{self.peer}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action in a text of `str`.

        Raises:
            ScheduleError: the text is not an action, or its peer does not fit its kind.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ScheduleError(
                f"cannot read the action {text!r}; "
                "write [chunk][op][micro-batch], e.g. 2F0, 2SEND_F0>1 or 2RECV_F0<1"
            )
        chunk, op_text, micro_batch, stretch, arrow, peer = match.groups()
        op = Op(op_text)
        expected = None if op in COMPUTE else ("<" if op in RECEIVES else ">")
        if arrow != expected:
            wanted = "no peer" if expected is None else f"'{expected}RANK' at its end"
            raise ScheduleError(f"cannot read the action {text!r}; {op.value} takes {wanted}")
        peer, stretch = (None if text is None else int(text) for text in (peer, stretch))
        return cls(op, int(chunk), int(micro_batch), peer, stretch)


Program = tuple[Action, ...]


def render_programs(programs: Mapping[int, Program]) -> str:
    """One line per rank, ranks ascending: `0: 0F0,0SEND_F0>1,0RECV_B0<1,0B0`."""
    return "".join(f"{rank}: {','.join(map(str, programs[rank]))}\n" for rank in sorted(programs))


def parse_programs(text: str) -> dict[int, Program]:
    """The programs in a text of `render_programs`; blank lines and # lines are skipped.

    Raises:
        ScheduleError: a line has no rank, repeats a rank, or holds something that is not an action.
    """
    programs: dict[int, Program] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        rank_text, colon, actions = line.partition(":")
        if not colon or not rank_text.strip().isdecimal():
            raise ScheduleError(f"line {number}: {line[:40]!r} does not start with 'RANK:'")
        rank = int(rank_text)
        if rank in programs:
            raise ScheduleError(f"line {number}: rank {rank} has a program already; join the two")
        try:
            programs[rank] = tuple(Action.parse(a) for a in actions.split(",") if a.strip())
        except ScheduleError as error:
            raise ScheduleError(f"line {number}: {error}") from None
    return programs


def peak_in_flight(
    program: Program,
    *,
    until: Literal["input", "weight"] = "weight",
    size: Callable[[int], float] | None = None,
) -> float:
    """The most activations that a program keeps at once.

    Args:
        program: one rank's actions; messages are ignored.
        until: the action that frees a chunk's activations. "input": the backward of the input (B or
            I). "weight": the backward of the weights (B or W); memory follows this one, since the
            saved tensors of a split backward stay until its W.
        size: the size of one micro-batch's activations by chunk, in any unit; None counts chunks.
    Returns:
        The peak, in the unit of `size`.
    """
    split = Op.BACKWARD_INPUT if until == "input" else Op.BACKWARD_WEIGHT
    keeping, freeing = Op.FORWARD, frozenset({Op.BACKWARD, split})
    live = peak = 0.0
    for action in program:
        op = action.op
        if op is keeping:
            live += 1 if size is None else size(action.chunk)
            peak = max(peak, live)
        elif op in freeing:
            live -= 1 if size is None else size(action.chunk)
    return peak
