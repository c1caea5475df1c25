"""A whole training step, two replicas, beside DDP, FSDP2 and DeepSpeed; one process beside a plain
loop.

One thread per rank; contestants (training_contestants.py) alternate. Beside the times of a step
stands the processor time that it takes of a rank, which other work on the machine leaves much as it
is.

    python benchmarks/data_parallel.py [--repetitions 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

import torch.distributed as dist

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from harness import Measurement, report
from support.processes.cluster import Cluster
from training_contestants import Work, build

MODEL = {
    "layers": 4,
    "hidden": 384,
    "intermediate": 1024,
    "heads": 6,
    "kv_heads": 6,
    "vocab": 1024,
}

STEPS = 3
"""Made by each contestant in turn, since a step may leave messages for the next one to await."""


def measure(
    rank: int, ranks: int, store: Any, *, contestants: list[str], repetitions: int, work: Work
) -> dict[str, list[tuple[float, float]]]:
    """Seconds, and seconds of processor time, per step of each contestant on this rank, in turn."""
    runs = build(contestants, work, rank, store, "127.0.0.1")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            run.run(STEPS)
            dist.barrier()
            if repetition:
                spent = time.perf_counter() - start, time.process_time() - cpu_start
                times[name].append((spent[0] / STEPS, spent[1] / STEPS))
    dist.destroy_process_group()
    return times


def compare(
    title: str,
    work: Work,
    contestants: list[str],
    against: str,
    arguments: Any,
    path: str | None,
) -> None:
    cluster = Cluster()
    times = cluster.run(
        "data_parallel:measure",
        work.ranks,
        contestants=contestants,
        repetitions=arguments.repetitions,
        work=work,
        timeout_s=1200,
    )[0]
    cluster.close()
    rows = [
        Measurement(name, tuple(seconds for seconds, _ in values)) for name, values in times.items()
    ]
    reference = next(row.median_s for row in rows if row.name == against)
    cpu_ms = {
        name: statistics.median(cpu for _, cpu in values) * 1e3 for name, values in times.items()
    }
    report(
        title,
        rows,
        {row.name: reference for row in rows},
        json_path=path,
        note=f"{work}; ratio = time / {against}; cpu ms = processor time of a step, first rank",
        columns={
            "cpu ms": cpu_ms,
            "cpu ratio": {n: ms / cpu_ms[against] for n, ms in cpu_ms.items()},
        },
        record={"cpu_ms": {name: [cpu * 1e3 for _, cpu in found] for name, found in times.items()}},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="prefix of the files to write")
    arguments = parser.parse_args()
    both = ["holdfast, fast", "holdfast, exact"]
    peers = ["DDP, fused AdamW", "FSDP2, fused AdamW", "DeepSpeed ZeRO-1"]
    prefix = arguments.json
    for each in (8, 1):
        compare(
            f"training step, 2 replicas, {each} micro-batches each",
            Work(MODEL, ranks=2, micro_batches=each, micro_batch=2, seq_len=128),
            both + peers,
            "DDP, fused AdamW",
            arguments,
            f"{prefix}-two-{each}.json" if prefix else None,
        )
    compare(
        "training step, one process, 8 micro-batches",
        Work(MODEL, ranks=1, micro_batches=8, micro_batch=2, seq_len=128),
        [*both, "plain loop, fused AdamW"],
        "plain loop, fused AdamW",
        arguments,
        f"{prefix}-one.json" if prefix else None,
    )


if __name__ == "__main__":
    main()
