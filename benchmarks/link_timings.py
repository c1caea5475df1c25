"""What it costs to compare the times of messages between ranks, as a share of the steps.

Data-parallel ranks train over this machine's loopback. Every ten steps their windows end with the
comparison of slow ranks and with that of slow links (elastic.straggler_every = 10), whose times are
taken apart; waits for a rank that is late to it count. Windows with and without both comparisons
alternate, too, but that ratio has the machine's noise. What noting a message takes beside the rest
of its record is measured alone.

    python benchmarks/link_timings.py [--ranks 2,4] [--windows 12]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from contextlib import closing
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from torch.distributed import Store

from support.processes.cluster import Cluster

STEPS = 10
"""Of a window, as elastic.straggler_every has it."""
CONFIG = {
    "model": {
        "family": "llama",
        "layers": 4,
        "hidden": 256,
        "intermediate": 704,
        "heads": 4,
        "vocab": 2048,
    },
    "train": {"steps": 10_000, "seq_len": 64, "micro_batch": 2, "device": "cpu"},
}
NOTED = 20_000
"""Messages that are noted to see what that takes."""


def measure(rank: int, ranks: int, store: Store, *, windows: int) -> dict[str, Any]:
    """The seconds of each window's steps and comparisons on this rank, in turn without and with."""
    from holdfast.trainer.config import convert_config
    from holdfast.trainer.reports import PhaseClock
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    train = {**CONFIG["train"], "global_batch": 4 * ranks}
    config = convert_config({**CONFIG, "train": train, "parallel": {"data": ranks}})
    training = open_training(config, local_world(rank, ranks), store)
    control, clock, step = training.groups.control, PhaseClock(), 0
    steps: dict[bool, list[float]] = {False: [], True: []}
    parts: dict[str, list[float]] = {"ranks": [], "links": []}
    for window in range(2 * windows + 2):
        compares = bool(window % 2)
        control.barrier()
        began_s = time.perf_counter()
        for _ in range(STEPS):
            training.groups.recorder.note_step(step + 1)
            clock.start(training)
            training.compute(step)
            clock.end(training, 0)
            training.vote(*training.reduce())
            training.apply(config.rate_of(step))
            step += 1
        control.barrier()
        ended_s = time.perf_counter()
        if compares:
            clock.compare(training, 2.0)
            between_s = time.perf_counter()
            clock.links.compare(training, 1e6)
            parts["ranks"].append(between_s - ended_s)
            parts["links"].append(time.perf_counter() - between_s)
        steps[compares].append(time.perf_counter() - began_s)
    messages = sum(1 for _ in training.groups.history())
    return {
        "without_s": steps[False][1:],
        "with_s": steps[True][1:],
        "compare_ranks_s": parts["ranks"][1:],
        "compare_links_s": parts["links"][1:],
        "messages": messages,
    }


def noting_s() -> float:
    """What it takes more to note a message that is counted among those of its tag."""
    from holdfast.parallel.comm.flight_recorder import FlightRecorder
    from holdfast.parallel.comm.tags import COLLECTIVES

    recorder = FlightRecorder(0)
    group = recorder.group("data")
    spans = {}
    for first in (0, COLLECTIVES.first):  # collectives count themselves
        took = []
        for _ in range(5):
            began_s = time.perf_counter()
            for number in range(NOTED):
                recorder.post(group, "send", "send", 1, 1 << 20, first + number % 64)
            took.append((time.perf_counter() - began_s) / NOTED)
        spans[first] = min(took)
    return spans[0] - spans[COLLECTIVES.first]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    noted_s = noting_s()
    print(f"noting a message: {1e6 * noted_s:.2f} us more")
    for ranks in map(int, arguments.ranks.split(",")):
        with closing(Cluster(ranks)) as cluster:
            results = cluster.run(
                "link_timings:measure", ranks, windows=arguments.windows, timeout_s=1200
            )
        found = results[0]
        without_s = statistics.median(found["without_s"])
        print(f"{ranks} ranks: a window of {STEPS} steps takes {without_s:.2f} s")
        for name in ("compare_ranks_s", "compare_links_s"):
            shares = [100 * each / without_s for each in sorted(found[name])]
            middle_s = statistics.median(found[name])
            print(
                f"  {name}: {1e3 * middle_s:.1f} ms, {statistics.median(shares):.2f} % of a window "
                f"({shares[0]:.2f}..{shares[-1]:.2f})"
            )
        ratios = [a / b for a, b in zip(found["with_s"], found["without_s"], strict=True)]
        print(
            f"  windows with / without: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}..{max(ratios):.3f}), load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
