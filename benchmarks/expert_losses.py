"""Throughput after ranks with experts are lost, on emulated compute.

Eight ranks train a model whose layers have 16 experts over all of them; each matrix product sleeps
for as long as a device would compute it, and everything else is the trainer's: dispatch over gloo,
schedules, exact sums. Tokens choose experts at random. The same global batch throughout. Aim: 0.95
of the share of the ranks that are left.

- nothing lost;
- lost: three of eight ranks are gone, and their experts are with others, as in the step of the
  loss: a rank has 4 experts where the mean is 3.2;
- lost, copies by load: as `parallel.expert_replicas = "auto"` has it some steps later, with as many
  experts a rank at most.

    python benchmarks/expert_losses.py [--repetitions 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import closing
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from executor import make_sleeps_exact
from harness import Measurement, report
from support.processes.cluster import Cluster
from tensor_strips_ranks import Device, one_step

RANKS, LOST, EXPERTS, MICRO_BATCHES = 8, (1, 4, 6), 16, 40
WAYS = ("nothing lost", "lost", "lost, copies by load")
CONFIG: dict[str, Any] = {
    "model": {
        **{"family": "qwen3_moe", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2},
        **{"vocab": 64, "experts": EXPERTS, "experts_per_token": 4, "expert_intermediate": 64},
        **{"router_aux_loss_coef": 0.01},
    },
    "train": {"seq_len": 256, "global_batch": MICRO_BATCHES, "micro_batch": 1},
    "parallel": {"data": RANKS, "expert": RANKS, "expert_replicas": "auto"},
    "elastic": {"enabled": True},
}


def plan(way: str) -> Any:
    """The plan of the ranks that are left."""
    from holdfast.parallel.plan.replan import Roster, replan
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.step.planning import plan_of

    full = plan_of(convert_config(CONFIG))
    if way == WAYS[0]:
        return full
    living = tuple(rank for rank in range(RANKS) if rank not in LOST)
    nodes = {rank: str(rank) for rank in range(RANKS)}
    found = replan(full, Roster(living, nodes), generation=1)
    if way == WAYS[1]:
        return found
    equal = ((1000,) * EXPERTS,) * len(found.layers)
    return replan(found, Roster(living, nodes, loads=equal), generation=2, move_layers=True)


def step_times(
    rank: int, world_size: int, store: dist.Store, *, way: str, flops: float, repetitions: int
) -> list[float]:
    """Seconds of steps of this rank; none where it is lost."""
    from holdfast.parallel.expert_parallel import Router
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.step import build
    from holdfast.trainer.worlds import local_world

    make_sleeps_exact()
    current = plan(way)
    if rank not in current.stage_replicas.ranks:
        return []
    with mock.patch.object(build, "plan_of", return_value=current):
        training = build.open_training(convert_config(CONFIG), local_world(rank, world_size), store)
    times = []
    torch.set_num_threads(1)
    drawn = torch.Generator().manual_seed(rank)

    def choose(router: Router, scores: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.rand(scores.shape, generator=drawn).topk(router.per_token).indices

    for step in range(repetitions + 1):
        training.groups["experts"].barrier()
        with Device(flops), mock.patch.object(Router, "_best", choose):
            begun = time.perf_counter()
            one_step(training, step)
        times.append(time.perf_counter() - begun)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--megaflops", type=float, default=60, help="a second, of a rank")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    found = []
    for way in WAYS:
        current = plan(way)
        most = max(len(current.experts_of(rank, 1)) for rank in current.stage_replicas.ranks)
        with closing(Cluster()) as cluster:
            times = cluster.run(
                "expert_losses:step_times",
                RANKS,
                timeout_s=1800,
                way=way,
                flops=given.megaflops * 1e6,
                repetitions=given.repetitions,
            )
        found.append(Measurement(f"{way} ({most} experts a rank at most)", tuple(times[0])))
    left = (RANKS - len(LOST)) / RANKS
    report(
        f"a step after {len(LOST)} of {RANKS} ranks with experts are lost (emulated)",
        found,
        {row.name: found[0].median_s for row in found},
        json_path=given.json,
        note=f"ratio: of step times, to nothing lost; the share of the ranks is 1 / {1 / left:.2f}",
    )


if __name__ == "__main__":
    main()
