"""Long sequences in a pipeline, as a whole and in stretches: python benchmarks/stretches.py

A pipeline of four ranks. First with emulated compute under the real executor: a step's time over
that of the busiest rank's work, for as many sequences as ranks and for one, with layers whose time
does not depend on the place of a token and with layers of which attention takes half: later
stretches then take longer. Then real training: the most memory that a step takes on a rank beyond
what it begins with. Losses must be equal.
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
from stretches_ranks import RANKS, Order
from support.processes.cluster import Cluster

SCHEDULES = {"1f1b": 1, "interleaved-1f1b": 2}
STRETCHES = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forward-ms", type=float, default=40)
    parser.add_argument("--attention", type=float, nargs="*", default=[0.0, 0.5])
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", help="path of the results, without kind and ending")
    given = parser.parse_args()
    for attention in given.attention:
        emulated(given, attention)
    trained(given)


def emulated(given: argparse.Namespace, attention: float) -> None:
    orders = {
        f"{schedule}, {sequences} sequences, {stretches} stretches": Order(
            schedule, virtual, stretches, sequences
        )
        for schedule, virtual in SCHEDULES.items()
        for sequences in (RANKS, 1)
        for stretches in STRETCHES
    }
    with closing(Cluster(RANKS)) as cluster:
        found = cluster.run(
            "stretches_ranks:emulate",
            RANKS,
            orders=orders,
            forward_s=given.forward_ms / 1e3,
            attention=attention,
            repetitions=given.repetitions,
            timeout_s=3600,
        )[0]
    report(
        f"a step over its work; attention takes {attention:.0%}",
        [Measurement(name, tuple(times)) for name, times in found.items()],
        {name: 3 * order.micro_batches * given.forward_ms / 1e3 for name, order in orders.items()},
        json_path=f"{given.json}-attention-{attention}.json" if given.json else None,
        note=f"pipeline {RANKS}; forward {given.forward_ms} ms a sequence and rank, backward twice",
    )


def trained(given: argparse.Namespace) -> None:
    memory: dict[str, float] = {}
    losses: set[str] = set()
    for stretches in STRETCHES:
        with closing(Cluster(RANKS)) as cluster:
            found = cluster.run(
                "stretches_ranks:train",
                RANKS,
                stretches=stretches,
                seq_len=given.seq_len,
                hidden=given.hidden,
                timeout_s=3600,
            )
        losses |= {taken.loss for taken in found}
        memory[f"{stretches} stretches"] = found[0].bytes / 2**20
    assert len(losses) == 1, "stretches change bits"
    whole = memory["1 stretches"]
    for name, size in memory.items():
        print(f"{name}: a step takes {size:.0f} MiB on the first rank, {size / whole:.2f} of whole")


if __name__ == "__main__":
    main()
