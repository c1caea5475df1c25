"""A step in flight: what its sums include is told, skipped when resumed, and reported once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.parallel.optimizer.accumulator import GradientAccumulator
from holdfast.parallel.optimizer.exchange.parameters import ParameterArrival
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.plan import training_program
from holdfast.trainer.config.loading import convert_config
from holdfast.trainer.step.construction import ModelParts, new_chunks
from holdfast.trainer.step.in_flight import StepInFlight
from holdfast.trainer.step.planning import plan_of

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


class Alone:
    """The groups of a single rank, each of them itself."""

    size, index = 1, 0
    axes: Mapping[str, Any] = {}

    def __getitem__(self, axis: str) -> Alone:
        return self


class Rank:
    """One rank's step over real parameters; gradients are ones."""

    def __init__(self) -> None:
        plan = plan_of(CONFIG)
        made = new_chunks(
            CONFIG,
            plan,
            0,
            Alone(),  # type: ignore[arg-type]
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
        plan = plan_of(CONFIG)
        return StepInFlight(plan, 0, self.model, training_program(plan, 0), 7)

    def begin(self, step: int) -> bool:
        return self.step.begin(step, lambda: self.halves.append(step))

    def backward(self, micro_batch: int, parameters: list[nn.Parameter] | None = None) -> None:
        self.step.before_gradients(micro_batch)
        for parameter in self.buffer.parameters if parameters is None else parameters:
            self.accumulator.add(parameter, torch.ones_like(parameter))


def losses(*micro_batches: int) -> dict[int, torch.Tensor]:
    return {m: torch.tensor(float(m)) for m in micro_batches}


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
    sums = rank.accumulator.sums.clone()
    following = rank.under_the_next_plan()
    following.resume(7, included, rank.step)
    assert following.missing(7, MICRO_BATCHES) == {0, 1, 3}
    assert following.missing(8, MICRO_BATCHES) == {0, 1, 2, 3}
    rank.step = following
    assert rank.begin(7) is True
    rank.backward(2)
    assert torch.equal(rank.accumulator.sums, sums)
    rank.backward(3)
    assert torch.equal(rank.accumulator.sums, 2 * sums)


def test_losses_of_an_interrupted_step_are_reported_again(rank: Rank) -> None:
    rank.begin(7)
    rank.backward(2)
    included = rank.step.included(losses(0, 2))  # micro-batch 0 has no backward pass yet
    following = rank.under_the_next_plan()
    following.resume(7, included, rank.step)
    rank.step = following
    rank.begin(7)
    assert following.reported(losses(0, 1, 3)) == losses(0, 1, 2, 3)


def test_a_rank_without_the_sums_does_not_report_what_another_reports(rank: Rank) -> None:
    rank.begin(7)
    rank.backward(2)
    included = rank.step.included(None)
    newcomer = Rank()
    newcomer.step.resume(7, included, None)
    newcomer.begin(7)
    assert newcomer.step.reported(losses(1, 2)) == losses(1)


def test_the_next_step_begins_with_empty_sums(rank: Rank) -> None:
    rank.begin(7)
    rank.backward(0)
    sums = rank.accumulator.sums.clone()
    assert sums.any()
    rank.step.resume(7, rank.step.included(losses(0)), rank.step)
    assert rank.begin(8) is False
    rank.backward(0)
    assert torch.equal(rank.accumulator.sums, sums)
    assert rank.step.reported(losses(0)) == losses(0)


def test_half_of_the_backward_passes_is_told_once(rank: Rank) -> None:
    rank.begin(7)
    for micro_batch in range(MICRO_BATCHES):
        rank.backward(micro_batch)
        assert rank.halves == ([7] if micro_batch >= 1 else [])
