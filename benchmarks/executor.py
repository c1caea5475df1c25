"""Executor against the simulated ideal, and torch.distributed.pipelining's executor beside it.

Four pipeline ranks, 16 micro-batches, gloo. A chunk's compute is a sleep (forward 20 ms / chunks
per rank, or as told; backward twice that), which shows schedule and overhead honestly when ranks
outnumber cores.

    python benchmarks/executor.py [--repetitions 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.pipelining as pipelining
from torch import Tensor, nn

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from harness import Measurement, report
from holdfast.parallel.comm.groups import GlooCommunicator, gloo_device
from holdfast.parallel.pipeline import Passage
from holdfast.parallel.pipeline.executor import Executor, MessageShape, receive_order
from holdfast.parallel.schedules import (
    Action,
    Op,
    check_programs,
    compute_programs,
    placement,
    simulate,
    with_messages,
)
from support.processes.cluster import Cluster

RANKS = 4
MICRO_BATCHES = 16
SPIN_S = 0.0002
SHAPE = (64, 64)

COST = {Op.FORWARD: 1.0, Op.BACKWARD: 2.0, Op.BACKWARD_INPUT: 1.0, Op.BACKWARD_WEIGHT: 1.0}
CASES = {
    "1F1B": ("1f1b", 1, "Schedule1F1B"),
    "interleaved, 4 chunks": ("interleaved-1f1b", 4, "ScheduleInterleaved1F1B"),
    "ZB-H1": ("zb-h1", 1, "ScheduleInterleavedZeroBubble"),
    "ZB-V": ("zb-v", 2, "ScheduleZBVZeroBubble"),
}


def cost_of(virtual: int, forward_s: float) -> Callable[[Action], float]:
    return lambda action: COST.get(action.op, 0.0) * forward_s / virtual


def make_sleeps_exact() -> None:
    """Timer slack off, or every emulated computation takes 50 microseconds longer than it says."""
    ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)


def sleep_until(deadline: float) -> None:
    """Sleep, then spin for the last moment: a late wake-up would falsify the measurement."""
    remaining = deadline - time.perf_counter() - SPIN_S
    if remaining > 0:
        time.sleep(remaining)
    while time.perf_counter() < deadline:
        pass


class SleepingChunk:
    """Emulated compute behind the executor's chunk protocol."""

    def __init__(self, forward_s: float) -> None:
        self._forward_s = forward_s
        self._output = torch.zeros(SHAPE)

    def _sleep(self, units: float) -> Tensor:
        sleep_until(time.perf_counter() + units * self._forward_s)
        return self._output

    def forward(self, passage: Passage, value: Tensor | None) -> Tensor:
        return self._sleep(1.0)

    def backward(self, passage: Passage, grad_output: Tensor | None) -> Tensor:
        return self._sleep(2.0)

    def backward_input(self, passage: Passage, grad_output: Tensor | None) -> Tensor:
        return self._sleep(1.0)

    def backward_weight(self, passage: Passage) -> None:
        self._sleep(1.0)


def our_programs(schedule: str, virtual: int) -> dict:
    where = placement(schedule, RANKS, virtual)
    programs = dict(enumerate(compute_programs(schedule, RANKS, virtual, MICRO_BATCHES)))
    complete = with_messages(programs, lambda chunk, micro_batch: where[chunk])
    check_programs(complete, RANKS * virtual, range(MICRO_BATCHES))
    return complete


def run_ours(
    rank: int,
    world_size: int,
    store: dist.Store,
    *,
    schedule: str,
    virtual: int,
    repetitions: int,
    forward_s: float,
) -> list[float]:
    make_sleeps_exact()
    comm = GlooCommunicator(
        store, "w", range(world_size), rank, device=gloo_device("127.0.0.1"), timeout_s=60
    )
    programs = our_programs(schedule, virtual)
    mine = placement(schedule, RANKS, virtual)
    chunks = {c: SleepingChunk(forward_s / virtual) for c, r in enumerate(mine) if r == rank}
    message = MessageShape(SHAPE, torch.float32, torch.device("cpu"))
    executor = Executor(chunks, RANKS * virtual - 1, message, comm, MICRO_BATCHES)
    order = receive_order(programs[rank], programs, rank)
    times = []
    for _ in range(repetitions + 1):
        comm.barrier()
        start = time.perf_counter()
        executor.run(programs[rank], order)
        comm.barrier()
        times.append(time.perf_counter() - start)
    return times[1:]


class _SleepInBackward(torch.autograd.Function):
    """Identity whose backward sleeps: on the input's path and on the weight's, so that a split
    backward runs each once."""

    @staticmethod
    def forward(ctx, value: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        sleep_until(time.perf_counter() + ctx.seconds)
        return gradient.clone(), None


class _SleepingLayer(nn.Module):
    def __init__(self, forward_s: float) -> None:
        super().__init__()
        self.forward_s = forward_s
        self.scale = nn.Parameter(torch.ones(SHAPE[1]))

    def forward(self, value: Tensor) -> Tensor:
        sleep_until(time.perf_counter() + self.forward_s)
        value = _SleepInBackward.apply(value, self.forward_s)
        return value * _SleepInBackward.apply(self.scale, self.forward_s)


def run_torch(
    rank: int,
    world_size: int,
    store: dist.Store,
    *,
    schedule: str,
    virtual: int,
    repetitions: int,
    forward_s: float,
) -> list[float]:
    make_sleeps_exact()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        stages_total = RANKS * virtual
        if "ZBV" in schedule:
            mine = [rank, 2 * RANKS - 1 - rank]
        else:
            mine = [rank + RANKS * v for v in range(virtual)]
        stages = [
            pipelining.PipelineStage(
                _SleepingLayer(forward_s / virtual), s, stages_total, torch.device("cpu")
            )
            for s in mine
        ]
        kind = getattr(pipelining, schedule)

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return (output - target).sum()

        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        runner = kind(stages[0] if single else stages, MICRO_BATCHES, loss_fn=loss)
        batch = torch.zeros(MICRO_BATCHES * SHAPE[0], SHAPE[1])
        times = []
        has_first = 0 in mine
        has_last = stages_total - 1 in mine
        for _ in range(repetitions + 1):
            dist.barrier()
            start = time.perf_counter()
            # Without a gradient for its input the first stage would skip half of its backward time.
            arguments = (batch.clone().requires_grad_(),) if has_first else ()
            runner.step(*arguments, **({"target": batch} if has_last else {}))
            dist.barrier()
            times.append(time.perf_counter() - start)
        return times[1:]
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--forward-ms", type=float, default=20.0, help="of a rank and micro-batch")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    forward_s = arguments.forward_ms / 1e3
    cluster = Cluster()
    rows, baseline = [], {}
    for title, (schedule, virtual, peer) in CASES.items():
        ideal = simulate(our_programs(schedule, virtual), cost_of(virtual, forward_s)).makespan
        common = {"virtual": virtual, "repetitions": arguments.repetitions, "forward_s": forward_s}
        contestants = [("holdfast", "executor:run_ours", schedule)]
        contestants.append(("torch.pipelining", "executor:run_torch", peer))
        for contestant, function, name in contestants:
            times = cluster.run(function, RANKS, schedule=name, timeout_s=300, **common)[0]
            rows.append(Measurement(f"{title}: {contestant}", tuple(times)))
            baseline[f"{title}: {contestant}"] = ideal
    cluster.close()
    report(
        f"pipeline step over simulated ideal, {RANKS} ranks, {MICRO_BATCHES} micro-batches, "
        f"forward {arguments.forward_ms:g} ms",
        rows,
        baseline,
        json_path=arguments.json,
        note="ratio = time / holdfast simulator's makespan of the same schedule without messages",
    )


if __name__ == "__main__":
    main()
