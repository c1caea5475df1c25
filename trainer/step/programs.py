"""A rank's programs under one plan, with the gradients that they offer. Local."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

from torch import nn

from holdfast.parallel.layout import LostGradient
from holdfast.parallel.pipeline import ExpertTeam
from holdfast.parallel.plan import Plan, evaluation_program, team_micro_batches, training_program
from holdfast.parallel.schedules import Program
from holdfast.trainer.step.construction import ModelParts, PreparedProgram, prepared

Only = frozenset[int] | None
"""The micro-batches that are computed; None: all of a step."""


class StepPrograms:
    """The programs of a rank: of steps, whole or in part, and of evaluations."""

    def __init__(self, plan: Plan, rank: int, model: ModelParts, team: ExpertTeam | None) -> None:
        """Local.

        Args:
            team: the ranks that have the experts of the tokens; None: those of the tensor group.
        """
        self._plan, self._rank, self._model, self._team = plan, rank, model, team
        self.whole: PreparedProgram = prepared(rank, self.of_rank(None))
        """The program of all micro-batches."""
        self._part: tuple[Only, PreparedProgram] = None, self.whole

    def of_rank(self, only: Only) -> Callable[[int], Program]:
        """Each rank's program."""
        return partial(training_program, self._plan, only=only)

    def of(self, only: Only) -> PreparedProgram:
        """The program of some micro-batches. That of the newest ones asked for is kept."""
        if only is None:
            return self.whole
        if self._part[0] != only:
            self._part = only, prepared(self._rank, self.of_rank(only))
        return self._part[1]

    def of_one(self, micro_batch: int) -> Program:
        """The program of one micro-batch, of any replica; for plans with one stage."""
        return tuple(replace(action, micro_batch=micro_batch) for action in self._of_first)

    @cached_property
    def _of_first(self) -> Program:
        return self.of_rank(self.first)(self._rank)

    @cached_property
    def first(self) -> frozenset[int]:
        """The micro-batch that this rank's program begins with; empty: it has none."""
        return frozenset(action.micro_batch for action in self.whole[0][:1])

    @cached_property
    def of_evaluation(self) -> PreparedProgram:
        """The program of one batch of an evaluation."""
        return prepared(self._rank, partial(evaluation_program, self._plan))

    def offers(self, only: Only, lost: Sequence[LostGradient] = ()) -> dict[nn.Parameter, int]:
        """The number of gradients that each parameter is offered by a program.

        Args:
            lost: those of experts that the team computes beside it.
        """
        own = None if self._team is None else self._team.index
        here = ((piece.layer, piece.expert) for piece in lost if piece.host == own)
        return self._model.offers(
            self.of(only)[0],
            self._plan.parts_of(self._rank),
            team_micro_batches(self._plan, self._rank, only),
            Counter[tuple[int, int | None]](here),
        )
