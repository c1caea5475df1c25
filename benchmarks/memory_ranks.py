"""One rank of the memory benchmark: a few steps, and the memory that they took at most."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

sys.path.insert(0, os.path.dirname(__file__))

from holdfast.parallel.plan import rank_memory
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step.build import open_training
from holdfast.trainer.step.saved_tensors import state_format
from holdfast.trainer.step.training import Training
from holdfast.trainer.worlds.world import local_world
from offload_memory import Memory
from support.runs.small_runs import convert_config

STEPS = 3
SMALL = {"layers": 1, "hidden": 64, "intermediate": 64, "heads": 4, "kv_heads": 4}


def train(config: RunConfig, training: Training) -> None:
    for step in range(STEPS):
        training.compute(step)
        training.vote(*training.reduce())
        training.apply(config.rate_of(step))
    training.finish_gather()


def measured(rank: int, world_size: int, store: Store, *, config: dict[str, Any]) -> dict[str, Any]:
    """The memory of this rank at most, above what it had before, and what is planned: bytes.

    Before, a small model has been trained, so that code and threads are there.
    """
    run = convert_config(config)
    small = convert_config({**config, "model": {**config["model"], **SMALL}})
    train(small, open_training(small, local_world(rank, world_size), PrefixStore("small", store)))
    memory = Memory(torch.device("cpu"))
    trainings: list[Training] = []
    _, built = memory.highest(
        lambda: trainings.append(open_training(run, local_world(rank, world_size), store))
    )
    [training] = trainings
    _, trained = memory.highest(lambda: train(run, training))
    form = state_format(run)
    exact = run.numerics.reduction == "exact"
    planned = rank_memory(
        training.plan, rank, precision=form.precision, copies=form.copies, exact=exact
    )
    return {"built": built, "trained": trained, "planned": asdict(planned)}
