"""A step in flight: what its sums include is told, skipped when resumed, and reported once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from holdfast.parallel.layout import Box, Slices, contributing_parts
from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.exchange.parameters import ParameterArrival
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.pipeline import Passage
from holdfast.parallel.plan import Plan, Roster, replan, training_program
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.loading import convert_config
from holdfast.trainer.step.construction import ModelParts, new_chunks
from holdfast.trainer.step.in_flight import StepInFlight
from holdfast.trainer.step.micro_batches.partial_sums import keeps_sums
from holdfast.trainer.step.planning import plan_of
from holdfast.trainer.step.vote.ballot import by_slice

CONFIG = convert_config(
    {
        "model": {
            "family": "llama",
            "layers": 2,
            "hidden": 8,
            "heads": 2,
            "kv_heads": 2,
            "vocab": 11,
        },
        "train": {"seq_len": 4, "global_batch": 4, "micro_batch": 1},
    }
)
MICRO_BATCHES = 4


class Group:
    """The groups of a rank of a stage replica, each of them itself."""

    axes: Mapping[str, Any] = {}

    def __init__(self, size: int = 1, index: int = 0) -> None:
        self.size, self.index = size, index

    def __getitem__(self, axis: str) -> Group:
        return self


class Rank:
    """One rank's step over real parameters; gradients are ones."""

    def __init__(self, plan: Plan | None = None, config: RunConfig = CONFIG, rank: int = 0) -> None:
        self.plan, self.rank = plan or plan_of(config), rank
        replica = self.plan.stage_replicas.stage_replica(rank)
        made = new_chunks(
            config,
            self.plan,
            rank,
            Group(len(replica), replica.index(rank)),  # type: ignore[arg-type]
            torch.device("cpu"),
            weights="unset",
        )
        [chunk] = made.values()
        self.buffer = ParameterBuffer(chunk.rows(), dtype=torch.float32, device=torch.device("cpu"))
        self.accumulator = GradientAccumulator(self.buffer, exact=True, fraction_bits=30)
        self.model = ModelParts({0: chunk}, self.buffer, self.accumulator, ParameterArrival())
        self.halves: list[int] = []
        self.step = self.under_the_next_plan()

    def under_the_next_plan(self) -> StepInFlight:
        program = training_program(self.plan, self.rank)
        return StepInFlight(self.plan, self.rank, self.model, program, 7)

    def begin(self, step: int) -> bool:
        return self.step.begin(step, lambda half: self.halves.append(step) if half else None)

    def backward(self, micro_batch: int, parameters: list[nn.Parameter] | None = None) -> None:
        self.step.before_gradients(micro_batch)
        for parameter in self.buffer.parameters if parameters is None else parameters:
            for unit in range(self.units[parameter]):
                self.accumulator.add(parameter, torch.ones_like(parameter), unit)

    def sum_of(self, row: tuple[int, str, Box]) -> torch.Tensor:
        """The sums of a row of the parameter tables."""
        [segment] = (s for s in self.buffer.segments if (s.layer, s.spec.name, s.spec.box) == row)
        return self.accumulator.part(segment.offset, segment.offset + segment.spec.elements)

    @property
    def rows(self) -> list[tuple[int, str, Box]]:
        return [(s.layer, s.spec.name, s.spec.box) for s in self.buffer.segments]

    @property
    def units(self) -> dict[nn.Parameter, int]:
        """The gradients of each parameter of a slice: one from each part that shares it."""
        parts = self.plan.parts_of(self.rank)
        return {s.parameter: len(contributing_parts(s.row, parts)) for s in self.buffer.segments}


def losses(*micro_batches: int) -> dict[Passage, torch.Tensor]:
    return {Passage(m): torch.tensor(float(m)) for m in micro_batches}


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_what_was_added_is_included(rank: Rank) -> None:
    assert rank.begin(7) is False
    rank.backward(2)
    head = list(rank.buffer.parameters)[-1]
    rank.backward(0, [head])
    included = rank.step.included(losses(0, 2))
    assert len(included) == len(rank.buffer.segments)
    by_parameter = {
        part.parameter: included[0, part.layer, part.row.index] for part in rank.buffer.segments
    }
    assert by_parameter.pop(head) == {0, 2}
    assert set(by_parameter.values()) == {frozenset({2})}


def test_a_resumed_step_skips_what_its_sums_include(rank: Rank) -> None:
    rank.begin(7)
    rank.backward(2)
    included = rank.step.included(losses(2))
    sums = rank.accumulator.sums.one.clone()
    following = rank.under_the_next_plan()
    following.resume(7, included, rank.step)
    assert following.missing(7, MICRO_BATCHES) == {0, 1, 3}
    assert following.missing(8, MICRO_BATCHES) == {0, 1, 2, 3}
    rank.step = following
    assert rank.begin(7) is True
    rank.backward(2)
    assert torch.equal(rank.accumulator.sums.one, sums)
    rank.backward(3)
    assert torch.equal(rank.accumulator.sums.one, 2 * sums)


def test_losses_of_an_interrupted_step_are_reported_again(rank: Rank) -> None:
    rank.begin(7)
    rank.backward(2)
    included = rank.step.included(losses(0, 2))  # micro-batch 0 has no backward pass yet
    following = rank.under_the_next_plan()
    following.resume(7, included, rank.step)
    rank.step = following
    rank.begin(7)
    assert following.reported(losses(0, 1, 3)) == by_slice(losses(0, 1, 2, 3), Slices())


def test_a_rank_without_the_sums_does_not_report_what_another_reports(rank: Rank) -> None:
    rank.begin(7)
    rank.backward(2)
    included = rank.step.included(None)
    newcomer = Rank()
    newcomer.step.resume(7, included, None)
    newcomer.begin(7)
    assert newcomer.step.reported(losses(1, 2)) == by_slice(losses(1), Slices())


def test_the_next_step_begins_with_empty_sums(rank: Rank) -> None:
    rank.begin(7)
    rank.backward(0)
    sums = rank.accumulator.sums.one.clone()
    assert sums.any()
    rank.step.resume(7, rank.step.included(losses(0)), rank.step)
    assert rank.begin(8) is False
    rank.backward(0)
    assert torch.equal(rank.accumulator.sums.one, sums)
    assert rank.step.reported(losses(0)) == by_slice(losses(0), Slices())


def test_half_of_the_backward_passes_is_told_once(rank: Rank) -> None:
    rank.begin(7)
    for micro_batch in range(MICRO_BATCHES):
        rank.backward(micro_batch)
        assert rank.halves == ([7] if micro_batch >= 1 else [])


def test_sums_stay_valid_in_a_smaller_replica(rank: Rank) -> None:
    """One of two ranks is left, with the other's part: its sums stay, part by part."""
    config = convert_config(
        msgspec.to_builtins(CONFIG) | {"parallel": {"tensor": 2}, "numerics": {"tensor_shards": 2}}
    )
    plan = plan_of(config)
    both = [Rank(plan, config, number) for number in range(2)]
    for each in both:
        each.begin(7)
        each.backward(2)
    left = both[1]
    left.backward(0)
    included = left.step.included(losses(0, 2))
    after = replan(plan, Roster((1,), {1: "node"}), generation=1)
    assert keeps_sums(plan, after, 1, frozenset())
    alone = Rank(after, config, 1)
    alone.step.resume(7, included, left.step)
    assert alone.step.missing(7, MICRO_BATCHES) == {0, 1, 2, 3}
    assert alone.begin(7) is True
    assert alone.step.reported({}) == {}  # another rank reports what is included
    for row in alone.rows:
        own = left.sum_of(row) if row in left.rows else torch.zeros(1, dtype=torch.int64)
        assert torch.equal(alone.sum_of(row), own.expand_as(alone.sum_of(row)))
    for micro_batch in range(MICRO_BATCHES):
        alone.backward(micro_batch)
    whole = Rank(after, config, 1)
    whole.begin(7)
    for micro_batch in range(MICRO_BATCHES):
        whole.backward(micro_batch)
    alone.accumulator.finish()
    whole.accumulator.finish()
    assert torch.equal(alone.accumulator.sums.one, whole.accumulator.sums.one)
    assert alone.step.reported(losses(0, 1, 2, 3)) == by_slice(losses(0, 1, 2, 3), Slices())
    again = alone.step.included(losses(0, 1, 2, 3))
    assert set(again.values()) == {frozenset(range(MICRO_BATCHES))}
