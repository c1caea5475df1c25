"""What a step takes when a rank is slow for random stretches: by the plan, by shares, by claims.

Data-parallel workers on this machine through the whole command. Emulated: every worker's micro-
batches take thirty times what the processor takes for them, as if it had a device of its own, and
those of the slow one three times that (the fault slow-compute). Real: workers compute on the cores
alone, and the slow one is stopped and continued so that it takes three times as long (throttle).
Each worker has fewer micro-batches than the fullest by one at most, so that there is room to spare.

    python benchmarks/slow_ranks.py [--repetitions 3] [--steps 60] [--kind emulated|real] \\
        [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))

from harness import alternate, report

CONFIG = """
[model]
family = "llama"
layers = {layers}
hidden = {hidden}
heads = 4
kv_heads = 2
vocab = 256
[train]
seq_len = 64
micro_batch = 1
global_batch = {batch}
[parallel]
data = {workers}
[checkpoint]
every = 0
[log]
every = 1000
tensorboard = false
[elastic]
enabled = true
respawn = false
straggler_every = 4
"""
SHAPES = {
    "emulated": {"layers": 2, "hidden": 64, "workers": 9, "batch": 64},
    "real": {"layers": 4, "hidden": 256, "workers": 3, "batch": 32},
}
WAYS = {
    "by the plan": [],
    "by shares": ["elastic.slow_ranks=relieve"],
    "by claims": ["elastic.claims=true"],
}
WARM_UP = 8
USUAL, FACTOR = 30.0, 3.0
STRETCH_S = 12.0
"""The mean seconds for which the rank is slow at a time."""


def faults(kind: str, workers: int, slow: bool, seed: int, last: int) -> list[dict[str, object]]:
    """The faults of a run: how long every rank takes, and the stretches of the slow one."""
    found: list[dict[str, object]] = []
    if kind == "emulated":
        usual = {"fault": "slow-compute", "step": 1, "seconds": 3600.0, "factor": USUAL}
        found += [{**usual, "rank": rank} for rank in range(workers)]
    if not slow:
        return found
    chance, step = random.Random(seed), WARM_UP + 1
    how = {"fault": "throttle", "factor": FACTOR}
    if kind == "emulated":
        how = {"fault": "slow-compute", "factor": USUAL * FACTOR}
    while step <= last:
        seconds = STRETCH_S * chance.uniform(0.5, 1.5)
        found.append({**how, "rank": 1, "step": step, "seconds": seconds})
        step += chance.randrange(8, 16)
    return found


def mean_step_s(
    kind: str, settings: list[str], steps: int, slow: bool, digests: set[str], seed: int
) -> float:
    """The mean after the first steps; what the run has computed is added to `digests`."""
    shape = SHAPES[kind]
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "run.toml", Path(folder) / "run"
        path.write_text(CONFIG.format(**shape))
        chaos = faults(kind, int(shape["workers"]), slow, seed, WARM_UP + steps)
        tables = ", ".join(
            "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in fault.items()) + "}"
            for fault in chaos
        )
        settings = [*settings, f"train.steps={WARM_UP + steps}", f"elastic.chaos=[{tables}]"]
        command = [sys.executable, "-m", "holdfast.launch.cli", "train", str(path)]
        command += ["--out", str(run)]
        command += [word for setting in settings for word in ("--set", setting)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        digests.add((run / "digests.jsonl").read_text())
        return statistics.fmean(json.loads(line)["step_s"] for line in lines[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kind", choices=SHAPES, default="emulated")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    digests = set[str]()
    seeds = iter(range(10**6))

    def measured(settings: list[str], slow: bool) -> float:
        return mean_step_s(given.kind, settings, given.steps, slow, digests, next(seeds))

    rows = alternate(
        {
            f"{name}, {'a slow rank' if slow else 'healthy'}": (
                lambda settings=settings, slow=slow: measured(settings, slow)
            )
            for slow in (False, True)
            for name, settings in WAYS.items()
        },
        given.repetitions,
    )
    healthy = rows[0].median_s
    shape = SHAPES[given.kind]
    report(
        f"{given.kind}: a step of {shape['workers']} workers and {shape['batch']} micro-batches",
        rows,
        {row.name: healthy for row in rows},
        json_path=given.json,
        note=(
            f"each number is the mean of {given.steps} steps of a run; ratio: to the healthy run "
            f"by the plan; different digests of all runs: {len(digests)} (1: bits are equal)"
        ),
    )


if __name__ == "__main__":
    main()
