"""Gradient codes on simulated delays: rounds that wait for all, repetition, sequential codes, and
micro-batches that workers take over from slow ones.

Workers take (0.5 + per_load * load) * lognormal(0.08) for a round, and 3 to 9 times as long while
they straggle, in bursts (Gilbert-Elliott). The master waits for twice the fastest worker's time,
and for all where the code does not tolerate who is late; that counts in full. Each code has the
best of some parameters. "GC, strict" waits for all with one straggler less than it could do
without, as published code does. Sequential codes need jobs that do not wait for each other, as
those of several models; the others do not.

    python benchmarks/gradient_codes.py [--workers 256] [--jobs 480] [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from holdfast.parallel.schedules.coding.codes import (
    AnyOf,
    Bursts,
    Code,
    Multiplexed,
    Returned,
    SelectiveRepetition,
)
from holdfast.parallel.schedules.coding.delays import (
    RoundTime,
    Slowness,
    coded_time,
    gilbert_elliott,
    speculative_time,
    uncoded_time,
)

CASES = (
    (0.03, 0.995, 8),
    (0.05, 0.995, 16),
    (0.03, 0.85, 16),
    (0.045, 0.85, 16),
    (0.03, 0.85, 8),
    (0.03, 0.60, 8),
)
"""The chance to begin and to end to straggle, and the time by load."""
FIXED = 0.5
MOST_DELAY = 8
MICRO_BATCHES = 8
"""Of each worker."""


class Strict(AnyOf):
    """As its authors' code has it: one straggler less is tolerated."""

    def tolerates(self, returned: Returned) -> bool:
        late = int((~returned[-1]).sum())
        return late < self.stragglers or not late


def grids(workers: int) -> dict[str, Sequence[Code]]:
    most = [count for count in range(4, 80, 2) if count < workers]
    few = [count for count in range(2, 45) if count < workers]
    windows = [(longest, longest + extra) for longest in (1, 2, 3) for extra in (1, 2)]
    return {
        "GC": [AnyOf(workers, count) for count in few],
        "GC, strict": [Strict(workers, count) for count in few],
        "SR-SGC": [
            SelectiveRepetition(workers, Bursts(longest, bursts * longest + 1, count))
            for longest in (1, 2, 3)
            for bursts in (1, 2)
            for count in most
        ],
        "M-SGC": [
            Multiplexed(workers, Bursts(longest, window, count))
            for longest, window in windows
            for count in most
        ],
    }


def best(
    codes: Iterable[Code], delays: Sequence[Slowness], time: RoundTime, jobs: int
) -> tuple[list[float], Code]:
    found = [([coded_time(c, d, time, jobs).seconds for d in delays], c) for c in codes]
    return min(found, key=lambda each: statistics.mean(each[0]))


def parameters(code: Code) -> str:
    bursts = getattr(code, "bursts", None)
    if bursts is None:
        return f"s={getattr(code, 'stragglers', 0)}"
    return f"{bursts.longest},{bursts.window},{bursts.most}"


def cell(seconds: Sequence[float], note: str = "") -> str:
    spread = f"{statistics.mean(seconds):.0f} ({min(seconds):.0f}..{max(seconds):.0f})"
    return f"{spread} {note}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=480)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    workers, jobs = arguments.workers, arguments.jobs
    names = [*grids(workers), "M / GC", "taken over", "taken over, not the fixed time"]
    table = Table("begins, ends, by load", "uncoded", *names, title=f"{workers} workers")
    for begins, ends, per_load in CASES:
        time = RoundTime(FIXED, per_load)
        delays = [
            gilbert_elliott(np.random.default_rng(seed), jobs + MOST_DELAY, workers, begins, ends)
            for seed in range(arguments.seeds)
        ]
        found = {name: best(codes, delays, time, jobs) for name, codes in grids(workers).items()}
        ratio = statistics.mean(found["M-SGC"][0]) / statistics.mean(found["GC"][0])
        first, spread = (
            [speculative_time(d, time, jobs, MICRO_BATCHES, fixed_first=way) for d in delays]
            for way in (True, False)
        )
        table.add_row(
            f"{begins}, {ends}, {per_load}",
            cell([uncoded_time(d, time, jobs) for d in delays]),
            *(cell(seconds, parameters(code)) for seconds, code in found.values()),
            f"{ratio:.2f}",
            cell(first),
            cell(spread),
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
