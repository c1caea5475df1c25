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
