"""Trainings of models with experts that keep how many tokens each expert had."""

from __future__ import annotations

from typing import Any

from torch.distributed import Store


def train_counting(rank: int, world_size: int, store: Store, *, config: dict) -> list[Any]:
    """Train all steps on this rank. Returns of each step, by layer, the choices of each expert."""
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.step.learning_rate import rate_of
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    training = open_training(run_config, local_world(rank, world_size), store)
    found = []
    for step in range(run_config.train.steps):
        training.compute(step)
        outcome = training.vote(*training.reduce())
        training.apply(rate_of(run_config, step))
        found.append(outcome.loads)
    return found


def train_balancing(rank: int, world_size: int, store: Store, *, config: dict) -> Any:
    """Train all steps on this rank.

    Returns the loads of each step, and after all of them the biases of the routers by name.
    """
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    training = open_training(run_config, local_world(rank, world_size), store)
    loads = []
    for step in range(run_config.train.steps):
        training.compute(step)
        loads.append(training.vote(*training.reduce()).loads)
        training.apply(1e-3)
    biases = {
        spec.name: parameter.detach().tolist()
        for chunk in training.chunks
        for (*_, spec), parameter in chunk.rows()
        if spec.balance is not None
    }
    return loads, biases
