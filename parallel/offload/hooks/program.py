"""A step's program as an offloader sees it: which backward passes come when."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

from holdfast.parallel.offload.hooks.offloader import Offloader
from holdfast.parallel.schedules import COMPUTE, Op, Program

Key = tuple[int, int]
"""(chunk, micro-batch): what names a forward pass and its backward pass."""


def backward_order(program: Program) -> list[Key]:
    """In which order a program's forward passes are gone back through."""
    starts = (Op.BACKWARD, Op.BACKWARD_INPUT)
    return [(a.chunk, a.micro_batch) for a in program if a.op in starts]


def reversed_at_once(program: Program) -> set[Key]:
    """The forward passes after which nothing is computed before their own backward pass."""
    computed = [action for action in program if action.op in COMPUTE]
    return {
        (one.chunk, one.micro_batch)
        for one, following in pairwise(computed)
        if one.op is Op.FORWARD
        and following.op in (Op.BACKWARD, Op.BACKWARD_INPUT)
        and (one.chunk, one.micro_batch) == (following.chunk, following.micro_batch)
    }


@dataclass(frozen=True, slots=True)
class SavedOfProgram:
    """Tells an offloader where in its program a step is; does nothing without one."""

    offloader: Offloader | None
    at_once: set[Key]

    @classmethod
    def of(cls, program: Program, offloader: Offloader | None) -> SavedOfProgram:
        """A step begins; a program without backward passes needs no offloader."""
        order = backward_order(program) if offloader is not None else []
        if offloader is None or not order:
            return cls(None, set())
        offloader.begin_step(order)
        return cls(offloader, reversed_at_once(program))

    def forward(self, key: Key) -> AbstractContextManager[None]:
        """Around a forward pass."""
        if self.offloader is None:
            return nullcontext()
        return self.offloader.forward(key, kind=key[0], at_once=key in self.at_once)

    def backward(self, key: Key) -> None:
        """Before a backward pass, or its first part."""
        if self.offloader is not None:
            self.offloader.backward(key)

    def end(self) -> None:
        """The program has run."""
        if self.offloader is not None:
            self.offloader.end_step()
