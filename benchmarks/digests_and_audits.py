"""What digests and audits cost: step times without them, with them, and as predicted, in turn.

Data-parallel workers on this machine through the whole command, with real compute. An audit
computes one micro-batch of the step's N once more, on one rank of several, while the others wait
for it at the end: with R ranks and K steps between audits, computation grows by 1 / (K N), and the
time of a step by R / (K N), as ranks compute side by side.

    python benchmarks/digests_and_audits.py [--repetitions 5] [--steps 16] [--workers 2] \\
        [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import os
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
layers = 4
hidden = 256
heads = 8
kv_heads = 4
vocab = 320
[train]
seq_len = 256
global_batch = {batch}
micro_batch = 1
[log]
every = 1000
tensorboard = false
"""
WAYS = {
    "neither": ["log.digests_every=0"],
    "digests": ["log.digests_every=1"],
    "audit of every step": ["log.digests_every=0", "elastic.audit_every=1"],
    "audit of every 4th step": ["log.digests_every=0", "elastic.audit_every=4"],
}
WARM_UP = 4
MICRO_BATCHES = 8
"""Of each worker."""


def mean_step_s(settings: list[str], steps: int, workers: int) -> float:
    """The mean: an audit makes some steps longer."""
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "run.toml", Path(folder) / "run"
        path.write_text(CONFIG.format(batch=MICRO_BATCHES * workers))
        command = [sys.executable, "-m", "holdfast.launch.cli", "train", str(path)]
        command += ["--out", str(run)]
        settings = [*settings, f"parallel.data={workers}", f"train.steps={WARM_UP + steps}"]
        command += [word for setting in settings for word in ("--set", setting)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (run / "metrics.jsonl").read_text().splitlines()[WARM_UP:]
        return statistics.fmean(json.loads(line)["step_s"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    rows = alternate(
        {
            name: lambda settings=settings: mean_step_s(settings, given.steps, given.workers)
            for name, settings in WAYS.items()
        },
        given.repetitions,
    )
    neither = rows[0].median_s
    predicted = 1 / MICRO_BATCHES
    report(
        f"a step of {given.workers} data-parallel workers, {MICRO_BATCHES} micro-batches each",
        rows,
        {row.name: neither for row in rows},
        json_path=given.json,
        note=(
            f"each number is the mean of {given.steps} steps of a run; ratio: to neither; "
            f"predicted of audits: {1 + predicted:.3f} and {1 + predicted / 4:.3f}"
        ),
    )


if __name__ == "__main__":
    main()
