"""Throughput after one of six ranks is lost, on emulated compute: what each way of going on gives.

Data 3 x pipeline 2, 24 layers, 1F1B, the same global batch of 24 micro-batches throughout. A layer's forward is a
sleep of 1 ms and its backward one of 2 ms, under the real executor over gloo.

- nothing lost: six ranks;
- pipeline dropped: the lost rank's whole pipeline stands still, and the other two share its micro-batches (what
  replica-granular recovery does, torchft's);
- re-routed: its micro-batches go to the other replicas of its stage (ReCycle's way, with its
  split backward);
- holdfast: re-routed, layers moved between the stages, and the step list-scheduled with split backwards.

Five ranks can do 5/4 of what four do, whatever the way: the work of a step does not change. More than that is a
shorter bubble.

    python benchmarks/lost_rank.py [--repetitions 7] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import msgspec
import torch
import torch.distributed as dist

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from cluster import Cluster
from executor import SHAPE, SleepingChunk, make_sleeps_exact
from harness import Measurement, report
from holdfast.parallel.comm_torch import GlooCommunicator, gloo_device
from holdfast.parallel.pipeline import Executor, MessageShape, receive_order
from holdfast.parallel.plan import Plan
from holdfast.parallel.replan import Roster, replan
from holdfast.trainer.config import RunConfig
from holdfast.trainer.planning import plan_of

RANKS, LOST = 6, 4
LAYERS, MICRO_BATCHES = 24, 24
LAYER_S = 0.001
WAYS = ("nothing lost", "pipeline dropped", "re-routed", "holdfast")


def plan(way: str) -> Plan:
    config = msgspec.convert(
        {
            "model": {
                **{"family": "llama", "layers": LAYERS, "hidden": 256, "intermediate": 1024},
                **{"heads": 4, "vocab": 16},
            },
            "train": {"seq_len": 64, "global_batch": MICRO_BATCHES, "micro_batch": 1},
            "parallel": {"pipeline": 2, "data": 3},
        },
        RunConfig,
    )
    full = plan_of(config)
    if way == "nothing lost":
        return full
    lost = {LOST}
    if way == "pipeline dropped":
        replica = full.cells.coordinates(LOST).data
        lost = {full.cells.rank(0, replica, stage) for stage in range(2)}
    living = tuple(rank for rank in full.cells.ranks if rank not in lost)
    roster = Roster(living, {rank: f"node{rank}" for rank in full.cells.ranks})
    return replan(full, roster, generation=1, move_layers=way == "holdfast")


def step_times(
    rank: int, world_size: int, store: dist.Store, *, way: str, repetitions: int
) -> list[float]:
    make_sleeps_exact()
    comm = GlooCommunicator(
        store, way, range(world_size), rank, device=gloo_device("127.0.0.1"), timeout_s=60
    )
    current = plan(way)
    programs = {r: current.program(r) for r in current.cells.ranks}
    mine = programs.get(rank, ())

    def blocks(chunk: int) -> int:
        """Transformer blocks alone count; embedding and head are taken to be free."""
        names = (current.layers[layer].name for layer in current.layers_of(chunk))
        return sum(name.startswith("block.") for name in names)

    chunks = {chunk: SleepingChunk(LAYER_S * blocks(chunk)) for chunk in current.chunks_of(rank)}
    message = MessageShape(SHAPE, torch.float32, torch.device("cpu"))
    executor = Executor(chunks, len(current.placement) - 1, message, comm, MICRO_BATCHES)
    order = receive_order(mine, programs, rank)
    times = []
    for _ in range(repetitions + 1):
        comm.barrier()
        begun = time.perf_counter()
        if mine:
            executor.run(mine, order)
        comm.barrier()
        times.append(time.perf_counter() - begun)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    cluster = Cluster()
    try:
        rows = [
            Measurement(
                way,
                tuple(
                    cluster.run(
                        "lost_rank:step_times", RANKS, way=way, repetitions=given.repetitions
                    )[0]
                ),
            )
            for way in WAYS
        ]
    finally:
        cluster.close()
    dropped = next(row for row in rows if row.name == "pipeline dropped")
    report(
        "a step after one of six ranks is lost (data 3 x pipeline 2, emulated)",
        rows,
        {row.name: dropped.median_s for row in rows},
        json_path=given.json,
        note="ratio: of step times, to dropping the pipeline; five busy ranks would give 0.8 of four",
    )


if __name__ == "__main__":
    main()
