"""Throughput after one rank of a tensor group is lost, on emulated compute.

The ranks of a stage replica take their share of a layer's time each: a sleep under the real
executor over gloo, with the messages that stages of different degrees send each other. The same
global batch throughout. Aim: 0.95 of the share of the ranks that are left.

- nothing lost;
- spares: the other ranks of the replica stand by, and its micro-batches go to other replicas of the
  stage (Holdfast without `numerics.tensor_shards`; what replica-granular recovery does at best);
- smaller: they go on as smaller stage replicas, and layers move between stages where that is worth
  it.

    python benchmarks/smaller_replicas.py [--repetitions 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import sys

import msgspec
import torch
import torch.distributed as dist

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from executor import SleepingChunk, make_sleeps_exact
from harness import Measurement, report
from holdfast.parallel.comm.groups import GlooCommunicator, gloo_device
from holdfast.parallel.layout import unit_rows
from holdfast.parallel.pipeline.executor import Executor, MessageShape, receive_order
from holdfast.parallel.plan import message_units
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.plan.replan import Roster, replan
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step.planning import plan_of
from lost_rank import blocks, timed_steps
from support.processes.cluster import Cluster

LAYERS, LAYER_S = 24, 0.004
LAYOUTS = {
    "tensor 4 x data 2": {"tensor": 4, "data": 2},
    "tensor 2 x pipeline 2 x data 2": {"tensor": 2, "pipeline": 2, "data": 2},
    "tensor 2 x pipeline 2 x data 2, virtual 2": {
        **{"tensor": 2, "pipeline": 2, "data": 2, "virtual": 2},
        "schedule": "interleaved-1f1b",
    },
    "tensor 2 x context 2 x data 2": {"tensor": 2, "context": 2, "data": 2},
}
RANKS, MICRO_BATCHES, LOST = 8, 28, 1
WAYS = ("nothing lost", "spares", "smaller")


def plan(layout: str, way: str) -> Plan:
    parallel = LAYOUTS[layout]
    config = msgspec.convert(
        {
            "model": {
                **{"family": "llama", "layers": LAYERS, "hidden": 256, "intermediate": 1024},
                **{"heads": 4, "vocab": 16},
            },
            "train": {
                **{"seq_len": 64, "global_batch": MICRO_BATCHES, "micro_batch": 1},
                "context_chunks": parallel.get("context", 1),
            },
            "numerics": {"tensor_shards": 4},
            "parallel": parallel,
        },
        RunConfig,
    )
    full = plan_of(config)
    if way == "nothing lost":
        return full
    living = tuple(rank for rank in full.stage_replicas.ranks if rank != LOST)
    # With has_room saying no, the ranks are spares.
    has_room = None if way == "smaller" else lambda plan, rank: False
    return replan(
        full, Roster(living, dict.fromkeys(range(RANKS), "node"), has_room=has_room), generation=1
    )


class CutChunk(SleepingChunk):
    """Emulated compute of one rank of a stage replica, whose hidden state has some tokens."""

    def __init__(self, forward_s: float, shape: tuple[int, ...]) -> None:
        super().__init__(forward_s)
        self._output = torch.zeros(shape)


def step_times(
    rank: int, world_size: int, store: dist.Store, *, layout: str, way: str, repetitions: int
) -> list[float]:
    make_sleeps_exact()
    comm = GlooCommunicator(
        store, way, range(world_size), rank, device=gloo_device("127.0.0.1"), timeout_s=60
    )
    current = plan(layout, way)
    programs = {r: training_program(current, r) for r in current.stage_replicas.ranks}
    mine, mesh = programs.get(rank, ()), current.mesh_of(rank)
    units = mesh.token_units[current.stage_replicas.shard_index(rank)]
    shape = (len(units), 16, 64)

    def rows_of(peer: int, sends: bool) -> tuple[slice, ...] | None:
        if current.mesh_of(peer) == mesh:
            return None
        return unit_rows(units, message_units(current, rank, peer, sends=sends), 1)

    chunks = {
        chunk: CutChunk(LAYER_S * blocks(current, chunk) / mesh.shards, shape)
        for chunk in current.chunks_of(rank)
    }
    message = MessageShape(shape, torch.float32, torch.device("cpu"), rows_of)
    executor = Executor(chunks, len(current.placement) - 1, message, comm, MICRO_BATCHES)
    return timed_steps(executor, comm, mine, receive_order(mine, programs, rank), repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    cluster = Cluster()
    rows, baseline = [], {}
    try:
        for layout in LAYOUTS:
            found = [
                Measurement(
                    f"{layout}: {way}",
                    tuple(
                        cluster.run(
                            "smaller_replicas:step_times",
                            RANKS,
                            layout=layout,
                            way=way,
                            repetitions=given.repetitions,
                        )[0]
                    ),
                )
                for way in WAYS
            ]
            baseline |= {row.name: found[0].median_s for row in found}
            rows += found
    finally:
        cluster.close()
    report(
        "a step after one of eight ranks is lost (emulated)",
        rows,
        baseline,
        json_path=given.json,
        note="ratio: of step times, to nothing lost; seven busy ranks of eight give 1.14",
    )


if __name__ == "__main__":
    main()
