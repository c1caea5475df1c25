"""Throughput after one of six ranks is lost, on emulated compute: what each way of going on gives.

Data 3 x pipeline 2, 24 layers, 1F1B, the same global batch throughout, of 12 or 24 micro-batches; a
rank of the first or of the second stage is lost. A layer's forward is a sleep of 1 ms and its
backward one of 2 ms, under the real executor over gloo.

- nothing lost: six ranks;
- pipeline dropped: the lost rank's whole pipeline stands still, and the other two share its
  micro-batches (what replica-granular recovery does, torchft's);
- re-routed: its micro-batches go to the other replicas of its stage (ReCycle's way, with its
  split backward);
- holdfast: re-routed, layers moved between the stages, and the step list-scheduled with split
  backwards; ranks keep elastic.activation_headroom = 0.3 more activations than the fullest did
  before, or as much again (1.0).

Five ranks can do 5/4 of what four do, whatever the way: the work of a step does not change. More
than that is a shorter bubble.

    python benchmarks/lost_rank.py [--repetitions 7] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping

import msgspec
import torch
import torch.distributed as dist

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from executor import SHAPE, SleepingChunk, make_sleeps_exact
from harness import Measurement, report
from holdfast.parallel.comm.groups import GlooCommunicator, gloo_device
from holdfast.parallel.pipeline.executor import Executor, MessageShape, receive_order
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.plan.replan import Roster, replan
from holdfast.parallel.schedules import Action, Program
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step.planning import plan_of
from support.processes.cluster import Cluster

RANKS, LAYERS, LAYER_S = 6, 24, 0.001
CASES = tuple((lost, micro_batches) for micro_batches in (12, 24) for lost in (0, 4))
"""The rank that is lost, of the first stage or of the second, and the micro-batches of a step."""
WAYS = (
    "nothing lost",
    "pipeline dropped",
    "re-routed",
    "holdfast",
    "holdfast, headroom 1.0",
)


def plan(way: str, lost_rank: int, micro_batches: int) -> Plan:
    config = msgspec.convert(
        {
            "model": {
                **{"family": "llama", "layers": LAYERS, "hidden": 256, "intermediate": 1024},
                **{"heads": 4, "vocab": 16},
            },
            "train": {"seq_len": 64, "global_batch": micro_batches, "micro_batch": 1},
            "parallel": {"pipeline": 2, "data": 3},
            "elastic": {"activation_headroom": 1.0} if "headroom" in way else {},
        },
        RunConfig,
    )
    full = plan_of(config)
    if way == "nothing lost":
        return full
    lost = {lost_rank}
    if way == "pipeline dropped":
        replica = full.stage_replicas.coordinates(lost_rank).data
        lost = {full.stage_replicas.rank(0, replica, stage) for stage in range(2)}
    living = tuple(rank for rank in full.stage_replicas.ranks if rank not in lost)
    roster = Roster(living, {rank: f"node{rank}" for rank in full.stage_replicas.ranks})
    return replan(full, roster, generation=1, move_layers="holdfast" in way)


def blocks(plan: Plan, chunk: int) -> int:
    """The transformer blocks of a chunk; embedding and head are taken to be free."""
    names = (plan.layers[layer].name for layer in plan.layers_of(chunk))
    return sum(name.startswith("block.") for name in names)


def timed_steps(
    executor: Executor,
    comm: GlooCommunicator,
    program: Program,
    order: Mapping[Action, int],
    repetitions: int,
) -> list[float]:
    """The seconds of steps that begin and end on all ranks at once; a first one does not count."""
    times = []
    for _ in range(repetitions + 1):
        comm.barrier()
        begun = time.perf_counter()
        if program:
            executor.run(program, order)
        comm.barrier()
        times.append(time.perf_counter() - begun)
    return times[1:]


def step_times(
    rank: int,
    world_size: int,
    store: dist.Store,
    *,
    way: str,
    lost: int,
    micro_batches: int,
    repetitions: int,
) -> list[float]:
    make_sleeps_exact()
    comm = GlooCommunicator(
        store, way, range(world_size), rank, device=gloo_device("127.0.0.1"), timeout_s=60
    )
    current = plan(way, lost, micro_batches)
    programs = {r: training_program(current, r) for r in current.stage_replicas.ranks}
    mine = programs.get(rank, ())
    chunks = {
        chunk: SleepingChunk(LAYER_S * blocks(current, chunk)) for chunk in current.chunks_of(rank)
    }
    message = MessageShape(SHAPE, torch.float32, torch.device("cpu"))
    executor = Executor(chunks, len(current.placement) - 1, message, comm, micro_batches)
    return timed_steps(executor, comm, mine, receive_order(mine, programs, rank), repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    cluster = Cluster()
    rows, baseline = [], {}
    try:
        for lost, micro_batches in CASES:
            case = f"{micro_batches} micro-batches, stage {lost // 3 + 1}"
            times = {
                way: cluster.run(
                    "lost_rank:step_times",
                    RANKS,
                    way=way,
                    lost=lost,
                    micro_batches=micro_batches,
                    repetitions=given.repetitions,
                )[0]
                for way in WAYS
            }
            found = [Measurement(f"{case}: {way}", tuple(times[way])) for way in WAYS]
            baseline |= {row.name: found[1].median_s for row in found}
            rows += found
    finally:
        cluster.close()
    report(
        "a step after one of six ranks is lost (data 3 x pipeline 2, emulated)",
        rows,
        baseline,
        json_path=given.json,
        note="ratio: of step times, to dropping the pipeline; five busy ranks give 0.8 of four",
    )


if __name__ == "__main__":
    main()
