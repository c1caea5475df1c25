"""A long sequence on one rank and on four: python benchmarks/long_context.py

One training step of sequences of 16,384 tokens in 8 slices, on one rank, and on the four of a
context group with either exchange. Of the fullest rank the memory that a step takes beyond what it
begins with, of the busiest its processor time: what a step would take if each rank had a processor
of its own, which four ranks on this machine's cores have not. Losses must be equal; the ring's,
which needs fast mode, within 1e-5. Torch's own context parallelism is no contestant: it has no
kernel for CPUs (2.13.0).
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from harness import Measurement, report
from long_context_ranks import Sizes
from support.processes.cluster import Cluster

LAYOUTS: dict[str, dict[str, object]] = {
    "one rank": {},
    "context 4, heads": {"context": 4, "context_exchange": "heads"},
    "context 4, keys": {"context": 4, "context_exchange": "keys"},
    "context 4, ring, fast": {"context": 4, "context_exchange": "ring"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--json")
    given = parser.parse_args()
    sizes = Sizes(given.layers, given.hidden, given.seq_len, given.repetitions)
    rows: list[Measurement] = []
    memory: dict[str, float] = {}
    wall: dict[str, float] = {}
    losses: dict[str, tuple[float, ...]] = {}
    for name, layout in LAYOUTS.items():
        ranks = 4 if layout else 1
        with closing(Cluster(ranks)) as cluster:
            found = cluster.run(
                "long_context_ranks:measure", ranks, sizes=sizes, layout=layout, timeout_s=3600
            )
        busiest = max(found, key=lambda taken: sum(taken.cpu_s))
        rows.append(Measurement(name, tuple(busiest.cpu_s)))
        memory[name] = max(taken.bytes for taken in found) / 2**20
        wall[name] = min(found[0].seconds)
        losses[name] = tuple(map(float.fromhex, found[0].losses))
    one, *exact, ring = losses.values()
    assert all(other == one for other in exact), "layouts change bits"
    assert all(abs(a - b) < 1e-5 * abs(b) for a, b in zip(ring, one, strict=True)), losses
    report(
        f"a step of {sizes.seq_len} tokens: processor time of the busiest rank",
        rows,
        {row.name: rows[0].median_s for row in rows},
        json_path=given.json,
        note=f"{sizes}",
        columns={
            "MiB": memory,
            "of one": {name: size / memory["one rank"] for name, size in memory.items()},
            "wall s here": wall,
        },
    )


if __name__ == "__main__":
    main()
