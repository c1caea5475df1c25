"""A rank's part in the votes of steps: what it tells, and what all ranks know of it afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.parallel.comm import Groups
from holdfast.parallel.optimizer import ShardedOptimizer
from holdfast.parallel.plan import Plan
from holdfast.trainer.config import RunConfig
from holdfast.trainer.models import experts_of, further_losses_of
from holdfast.trainer.step.vote import (
    TIMES,
    BallotFormat,
    Logits,
    Notes,
    Outcome,
    RankTimes,
    Requests,
    by_layer,
    largest_of,
    packed,
    place_of,
    slowness_of,
    times_of,
    with_loads,
    words_of,
)


class Told(NamedTuple):
    """What a rank tells of its step."""

    step: int
    """Counted from 0."""
    squares: Tensor
    """The square sums of its blocks: float64[slots]."""
    flags: int
    """As of `ShardedOptimizer.reduce`."""
    losses: Tensor
    """As of `loss_slots`."""
    notes: Notes
    """What its layers noted that no other rank reports."""
    times: RankTimes | None
    """Its times, in a step that compares those of all ranks."""


class StepVote:
    """The votes of one rank under one plan. Exact-mode safe."""

    def __init__(
        self, config: RunConfig, plan: Plan, rank: int, optimizer: ShardedOptimizer, groups: Groups
    ) -> None:
        """Nothing is voted on yet. Local."""
        self._config, self._plan, self._rank = config, plan, rank
        self._optimizer, self._groups = optimizer, groups
        self.rank_times: Mapping[int, RankTimes] = {}
        """The times of all ranks, as the last vote that compared them told."""

    def outcome(self, told: Told, requests: Requests, predicted: int) -> Outcome:
        """All-reduce what ranks tell of a step. Collective over all ranks.

        Args:
            predicted: the tokens that the step predicts, over all replicas.
        """
        plan, notes, times = self._plan, told.notes, told.times
        layers, parameters, outputs = (), None, torch.empty(0, 0, dtype=torch.float64)
        if self._config.log.has_norms(told.step):
            layers, parameters = self._block_layers, self._optimizer.parameter_squares()
            place = place_of(plan, self._rank)
            outputs = packed(notes.outputs, len(plan.layers) - 1, *place)
        bit_sums = self._bit_sums() if self._config.log.has_digests(told.step) else None
        ballot = BallotFormat(
            self._optimizer.slots,
            len(told.losses),
            layers,
            (len(plan.layers), experts_of(self._config.model)),
            (len(outputs), outputs.shape[1]),
            1 + further_losses_of(self._config.model),
            0 if bit_sums is None else len(plan.layers),
            0 if times is None else plan.stage_replicas.size,
        )
        logits = self._largest_logits(notes.logits)
        summed = ballot.pack(
            told.squares,
            told.losses,
            told.flags,
            requests,
            parameters,
            notes.loads,
            outputs,
            bit_sums,
            None if times is None else self._row_of(times),
        )
        self._groups.control.all_reduce(summed).wait()
        outcome = ballot.outcome(summed, predicted)
        if times is not None:
            told_times = times_of(ballot.times(summed), plan.stage_replicas.ranks)
            self.rank_times = with_loads(plan, told_times, outcome.loads)
            outcome = replace(outcome, slowness=slowness_of(plan, self.rank_times))
        return replace(outcome, logits=logits)

    def _row_of(self, times: RankTimes) -> Tensor:
        """This rank's row in the table of times: float64[ranks, TIMES], zero elsewhere."""
        ranks = self._plan.stage_replicas.ranks
        rows = torch.zeros(len(ranks), TIMES, dtype=torch.float64)
        rows[ranks.index(self._rank)] = torch.tensor([*times.phases, *times[1:]])
        return rows

    def _bit_sums(self) -> Tensor:
        count, grace_s = len(self._plan.layers), self._config.elastic.startup_grace_s
        with self._groups.recorder.busy("compare", grace_s):
            gradients = self._optimizer.bit_sums("gradients", count)
            return words_of(gradients, self._optimizer.bit_sums("parameters", count))

    def _largest_logits(self, noted: Logits) -> tuple[tuple[float, ...], ...]:
        """The largest logit of each head, as of `Outcome.logits`. Collective over all ranks.

        The largest of several is the same in any order, and one that is told twice counts once.
        """
        if not self._config.optimizer.qk_clip:
            return ()
        found = largest_of(noted, len(self._plan.layers), self._config.model.heads)
        self._groups.control.all_reduce(found, "max").wait()
        return by_layer(found)

    @cached_property
    def _block_layers(self) -> tuple[int, ...]:
        """The layer of each block, by its slot."""
        optimizer = self._optimizer
        found = {optimizer.slot(b.key): b.layer for part in self._plan.blocks for b in part}
        return tuple(found[slot] for slot in range(optimizer.slots))
