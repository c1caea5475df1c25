"""Steps that are taken back from memory leave the bits of the step before them, in any layout."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from torch.distributed import Store

from holdfast.trainer.config import convert_config
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config

pytestmark = [pytest.mark.mp]

STEPS = 5
BACK = 3


def take_back_and_repeat(rank: int, world_size: int, store: Store, *, config: dict) -> Any:
    """Train; try steps without a sample, take steps back, and train them again.

    Returns:
        By step, its loss and norm; digests before each step; then the same of the repetition.
    """
    from unittest import mock

    from holdfast.parallel.plan.replan import Roster, with_shadows
    from holdfast.trainer.config import Removal
    from holdfast.trainer.elastic.corruption import compare_copies
    from holdfast.trainer.elastic.state_recovery import fill_shadows
    from holdfast.trainer.step import build
    from holdfast.trainer.worlds.world import local_world

    run_config = convert_config(config)
    nodes = {r: f"node{r}" for r in range(world_size)}
    plan_of, roster = build.plan_of, Roster(tuple(range(world_size)), nodes)
    shadows = run_config.elastic.redundancy if world_size > 1 else 0
    with mock.patch.object(build, "plan_of", lambda c: with_shadows(plan_of(c), roster, shadows)):
        training = build.open_training(run_config, local_world(rank, world_size), store)
    if shadows:
        fill_shadows(training, training.groups.world, nodes)

    def run(first: int) -> list[Any]:
        found = []
        for step in range(first, STEPS):
            digest = training.parameter_digest()
            training.compute(step)
            outcome = training.vote(*training.reduce())
            training.apply(run_config.rate_of(step))
            found.append((digest, outcome.loss.hex(), outcome.grad_norm.hex()))
        return [*found, training.parameter_digest()]

    once = run(0)
    first = STEPS - BACK
    with training.trial():
        training.take_back(first)
        training.gather_again()
        number = training.data.numbers(run_config.train.samples_before(first), 1)
        training.remove([Removal(start=first, samples=list(number))])
        tried = run(first)
    assert training.parameter_digest() == once[-1]
    assert not training.config.data.without
    training.take_back(first)
    training.gather_again()
    training.history.forget_from(first)
    again = run(first)
    if shadows:
        assert training.shadows.blocks
        assert not compare_copies(training, training.groups.world).corrupt
    return once, tried, again, training.optimizer.step


LAYOUTS: list[dict[str, Any]] = [
    {"parallel": {"data": 2}},
    {"parallel": {"data": 2}, "elastic": {"redundancy": 1}, "train": {"precision": "bf16"}},
    {"parallel": {"data": 3}, "elastic": {"redundancy": 1, "shadow_memory": "host"}},
    {"parallel": {"data": 2, "pipeline": 2}, "train": {"precision": "bf16"}},
    {"parallel": {"tensor": 2}, "optimizer": {"name": "muon"}},
    {"parallel": {"data": 2, "shard": "parameters"}, "optimizer": {"ema": 0.9}},
    {"parallel": {"data": 2, "shard": "gradients"}, "optimizer": {"state": "host"}},
]


@pytest.mark.parametrize("sections", LAYOUTS, ids=str)
def test_steps_taken_back_are_repeated_with_the_same_bits(
    cluster: Cluster, sections: dict[str, Any]
) -> None:
    train = {"steps": STEPS, "global_batch": 4, "micro_batch": 1, **sections.get("train", {})}
    config = make_config(
        **{
            **sections,
            "model": {"layers": 2},
            "train": train,
            "elastic": {"rewind": BACK, "redundancy": 0, **sections.get("elastic", {})},
        }
    )
    here = f"{__name__}:take_back_and_repeat"
    for once, tried, again, updates in cluster.run(
        here, config.parallel.ranks, config=msgspec.to_builtins(config)
    ):
        assert again == once[STEPS - BACK :]
        assert tried[0][0] == again[0][0], "a trial begins with the state of the same step"
        assert tried[-1] != again[-1], "and trains without the sample"
        assert updates == STEPS
