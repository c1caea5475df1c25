"""One rank's training in this process: its hooks, and what a run that is not elastic does
without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from holdfast.parallel.errors import ConfigError, OffloadError
from holdfast.parallel.pipeline import Passage
from holdfast.parallel.schedules import StepPhase
from holdfast.trainer.step.build import choose_device, open_training
from holdfast.trainer.step.training import Training
from holdfast.trainer.worlds.world import local_world
from support.runs.small_runs import make_config


def opened(**sections: Any) -> Training:
    config = make_config(
        model={"layers": 1, "hidden": 8, "intermediate": 8, "heads": 2, "kv_heads": 2},
        train={"steps": 2, "seq_len": 4, "global_batch": 4, "eval_batches": 1},
        **sections,
    )
    return open_training(config, local_world(0, 1), HashStore())


@pytest.fixture
def training() -> Iterator[Training]:
    mode = torch.get_deterministic_debug_mode()
    yield opened()
    torch.set_deterministic_debug_mode(mode)


def test_half_of_the_backward_passes_is_told_with_the_step_counted_from_one(
    training: Training,
) -> None:
    told: list[tuple[int, StepPhase]] = []
    training.compute(0, lambda step, phase: told.append((step, phase)))
    assert [phase for _, phase in told].count("micro-batch") == 4
    assert [at for at in told if at[1] != "micro-batch"] == [(1, "backward")]
    outcome = training.vote(*training.reduce())
    training.apply(1e-3)
    assert (training.progress.decided, training.progress.updated) == (1, 1)
    assert outcome.usable


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_step_whose_activations_are_lost_goes_on_from_the_sums_it_has(
    training: Training, done: int
) -> None:
    """Complete sums may have left for their owners: they are not computed again."""
    other = opened(offload={"activations": "host"})
    [runner] = other._runners.values()
    backward, passes = runner.backward, iter(range(100))

    def failing(passage: Passage, grad_output: Any) -> Any:
        if next(passes) == done:
            raise OffloadError("activations cannot be read back")
        return backward(passage, grad_output)

    def failing_after_all(*program: Any) -> Any:
        other.executor.run = run  # type: ignore[method-assign]
        run(*program)
        raise OffloadError("activations cannot be read back")

    run = other.executor.run
    if done == 4:
        other.executor.run = failing_after_all  # type: ignore[method-assign]
    else:
        runner.backward = failing  # type: ignore[method-assign]
    outcomes = []
    for each in (training, other):
        each.compute(0)
        outcomes.append(each.vote(*each.reduce()))
    assert outcomes[0] == outcomes[1]
    assert next(passes) == (0 if done == 4 else 5)


def test_a_training_that_is_not_elastic_has_no_followers(training: Training) -> None:
    assert training._shadows is None
    assert training.background_transfer is None
    assert not training.saves_from_shadows
    training.protect(lambda number: number)
    training.protect(None)


def test_a_decided_step_includes_nothing_and_an_interrupted_one_all_that_was_added(
    training: Training,
) -> None:
    training.compute(0)
    assert set(training.included().values()) == {frozenset(range(4))}
    training.vote(*training.reduce())
    training.apply(1e-3)
    assert training.included() == {}
    training.evaluate()
    assert training.included() == {}


def test_evaluation_changes_no_parameter_and_gives_the_same_loss_again(training: Training) -> None:
    digest = training.parameter_digest()
    losses = [training.evaluate()["held_out"], training.evaluate()["held_out"]]
    assert losses[0] == losses[1] > 0
    assert training.parameter_digest() == digest


def test_a_rank_without_a_gpu_of_its_own_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = make_config(train={"device": "cuda"}, numerics={"reduction": "fast"})
    with pytest.raises(ConfigError, match=r"needs GPU 1, and torch sees 1; start at most 1 rank"):
        choose_device(config, 1)
