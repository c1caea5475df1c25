"""A step's program as an offloader sees it: the order of its backward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

from holdfast.parallel.offload.hooks.offloader import Offloader
from holdfast.parallel.schedules import COMPUTE, ActionKey, Op, Program

Key = ActionKey
"""The name of a forward pass and of its backward pass."""


def backward_order(program: Program) -> list[Key]:
    """The keys of a program's forward passes, in the order of their backward passes."""
    starts = (Op.BACKWARD, Op.BACKWARD_INPUT)
    return [a.key for a in program if a.op in starts]


def reversed_at_once(program: Program) -> set[Key]:
    """The keys of the forward passes that their own backward pass follows directly."""
    computed = [action for action in program if action.op in COMPUTE]
    return {
        one.key
        for one, following in pairwise(computed)
        if one.op is Op.FORWARD
        and following.op in (Op.BACKWARD, Op.BACKWARD_INPUT)
        and one.key == following.key
    }


@dataclass(frozen=True, slots=True)
class SavedOfProgram:
    """Tells an offloader how far a program is; does nothing without an offloader."""

    offloader: Offloader | None
    at_once: set[Key]

    @classmethod
    def of(cls, program: Program, offloader: Offloader | None) -> SavedOfProgram:
        """Begin a step; a program without backward passes needs no offloader."""
        order = backward_order(program) if offloader is not None else []
        if offloader is None or not order:
            return cls(None, set())
        offloader.begin_step(order)
        return cls(offloader, reversed_at_once(program))

    def forward(self, key: Key) -> AbstractContextManager[None]:
        """A context around the forward pass of `key`."""
        if self.offloader is None:
            return nullcontext()
        return self.offloader.forward(key, kind=key[0], at_once=key in self.at_once)

    def backward(self, key: Key) -> None:
        """Note that the backward pass of `key`, or its first part, begins."""
        if self.offloader is not None:
            self.offloader.backward(key)

    def end(self) -> None:
        """End the step: the program has run."""
        if self.offloader is not None:
            self.offloader.end_step()
