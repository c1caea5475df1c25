"""The memory of a rank, as it is planned and as it is: replicated state, and ZeRO-1, -2 and -3.

Each rank is a process that says how much more memory it has at most, while it is made and while it
trains, than before: the kernel's count of resident pages. The heap gives large freed blocks back at
once, so that what was free is not counted.

    python benchmarks/memory.py [--reduction exact,fast] [--ways ZeRO-1,ZeRO-3]
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

import msgspec
from rich.console import Console
from rich.table import Table

from support.processes.cluster import Cluster
from support.runs.small_runs import make_config

MODEL = {
    "layers": 12,
    "hidden": 512,
    "intermediate": 1408,
    "heads": 8,
    "kv_heads": 8,
    "vocab": 4096,
    "dropout": 0.0,
}
WAYS: dict[str, dict[str, Any]] = {
    "replicated": {"data": 1},
    "ZeRO-1": {"data": 4},
    "ZeRO-2": {"data": 4, "shard": "gradients"},
    "ZeRO-3": {"data": 4, "shard": "parameters"},
}
HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(cluster: Cluster, layout: dict[str, Any], reduction: str) -> list[dict[str, Any]]:
    config = make_config(
        model=MODEL,
        train={"seq_len": 128, "global_batch": 8, "micro_batch": 1, "steps": 100},
        optimizer={"block_elements": 262144},
        numerics={"reduction": reduction},
        parallel=layout,
    )
    plain = msgspec.to_builtins(config)
    return cluster.run("memory_ranks:measured", layout["data"], config=plain, timeout_s=300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reduction", default="exact,fast")
    parser.add_argument("--ways", default=",".join(WAYS))
    arguments = parser.parse_args()
    table = Table(title="memory of the fullest rank, MiB")
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers")
    for column in ("state", "mode", "built", "trained", "planned", "trained / planned", *parts):
        table.add_column(column, justify="right")
    for reduction in arguments.reduction.split(","):
        for name in arguments.ways.split(","):
            with closing(Cluster(4, environment=HEAP)) as cluster:
                found = max(measure(cluster, WAYS[name], reduction), key=lambda r: r["trained"])
            planned = sum(found["planned"].values())
            table.add_row(
                name,
                reduction,
                *(f"{value / 2**20:.0f}" for value in (found["built"], found["trained"], planned)),
                f"{found['trained'] / planned:.3f}",
                *(f"{found['planned'].get(part, 0) / 2**20:.0f}" for part in parts),
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
