"""A worker of four is killed, or stopped, at random instants: how long until steps are committed
again.

The same shape of model and batch under

- holdfast, `elastic.enabled`: four data-parallel ranks, exact mode, one shadow per block;
- the same with so wide an MLP that a step takes as long as one with experts;
- holdfast with 16 experts over the four ranks, or over each two of them, of as much work for a
  token;
- torchft, `manager.allreduce` over gloo: four replicas, each restarted when it has died, with the
  same heartbeat settings, and plain AdamW (its DDP wrapper fails on torch 2.13 when a peer dies);
- torchrun --max-restarts: holdfast's plain workers with a checkpoint every 5 steps, loaded at each
  restart.

An observer outside polls every 2 ms which step has been committed. What is reported of a fault is
the longest of the three gaps that follow it (fault to next commit, then from commit to commit),
less the median time of a step: so that a step that was as good as done when the fault came does not
count as recovery.

    [RECOVERY_HIDDEN=96] [RECOVERY_SEQ_LEN=128] python benchmarks/recovery.py
        [--faults 8] [--json out.json]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

from harness import Measurement, report
from recovery_jobs import (
    EXPERTS,
    LONG,
    LONGEST_S,
    RANKS,
    UNDISTURBED_STEPS,
    Contestant,
    holdfast,
    torchrun,
)
from recovery_torchft import torchft


def measure(
    job: Contestant, faults: int, number: signal.Signals, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds that each fault has cost beyond a step, and that each replacement's arrival has."""
    rng = random.Random(seed)
    found: list[float] = []
    joins: list[float] = []
    waiting_since: float | None = None
    deadline = time.monotonic() + LONGEST_S
    while len(found) < faults:
        workers = job.workers()
        if not workers:
            if time.monotonic() > deadline:
                raise TimeoutError("not all workers take part again")
            time.sleep(0.05)
            continue
        job.observer.wait_for(UNDISTURBED_STEPS)
        step_s = job.observer.step_s()
        if waiting_since is not None:
            gap = job.observer.longest_between(waiting_since, time.perf_counter())
            joins.append(gap - step_s)
        time.sleep(step_s * rng.random())
        victim = rng.choice(job.workers() or workers)
        fault_at = time.perf_counter()
        os.kill(victim, number)
        job.observer.wait_for(3)
        found.append(job.observer.longest_gap(fault_at) - step_s)
        if number == signal.SIGSTOP:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
        waiting_since = time.perf_counter()
        job.replace()
        deadline = time.monotonic() + LONGEST_S
    return tuple(found), tuple(joins)


CONTESTANTS = {
    "holdfast": holdfast,
    "holdfast, longer steps": partial(holdfast, family=LONG),
    "holdfast, experts": partial(holdfast, family=EXPERTS, expert=RANKS),
    "holdfast, experts twice": partial(holdfast, family=EXPERTS, expert=RANKS // 2),
    "torchft": torchft,
    "torchrun restart": torchrun,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=8)
    parser.add_argument("--json", default=None)
    parser.add_argument("--only", default="")
    parser.add_argument("--stop-only", action="store_true", help="leave out the killed workers")
    given = parser.parse_args()
    for kind, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        if given.stop_only and number == signal.SIGKILL:
            continue
        rows: list[Measurement] = []
        arrivals: list[Measurement] = []
        steps: dict[str, float] = {}
        for name, start in CONTESTANTS.items():
            if given.only not in name or (number == signal.SIGSTOP and "holdfast" not in name):
                # torchrun waits for ever; torchft's replicas did not all come back in time
                continue
            with tempfile.TemporaryDirectory() as folder, start(Path(folder)) as job:
                lost, joined = measure(job, given.faults, number, seed=3)
                rows.append(Measurement(name, lost))
                if joined and name != "torchrun restart":
                    arrivals.append(Measurement(f"{name}: a replacement joins", joined))
                steps[name] = job.observer.step_s()
        medians = {row.name: row.median_s for row in rows}
        report(
            f"one of {RANKS} workers is {kind}: time lost",
            [*rows, *arrivals],
            {name: medians["torchft"] for name in medians} if "torchft" in medians else {},
            json_path=given.json and f"{given.json.removesuffix('.json')}-{kind}.json",
            note="ratio: to torchft; a step takes "
            + ", ".join(f"{1e3 * steps[name]:.0f} ms ({name})" for name in steps),
        )


if __name__ == "__main__":
    main()
