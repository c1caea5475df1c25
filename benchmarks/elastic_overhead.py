"""What `elastic.enabled` costs while nothing is lost: step times with and without it, in turn.

Two data-parallel workers on this machine, real training; with redundancy 0 and 1. The share that shadows cost
falls with the tokens of a step, since theirs is the work of an optimizer update.

    python benchmarks/elastic_overhead.py [--repetitions 3] [--steps 12] [--json out.json]
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
layers = 6
hidden = 192
heads = 6
kv_heads = 3
vocab = 320
[data]
kind = "text"
tokenizer = "bytes"
[train]
seq_len = 256
global_batch = 16
micro_batch = 2
[parallel]
data = 2
[log]
every = 1000
tensorboard = false
"""
WAYS = {
    "fixed ranks": ["elastic.enabled=false"],
    "elastic, no shadows": ["elastic.enabled=true", "elastic.redundancy=0"],
    "elastic, 1 shadow": ["elastic.enabled=true", "elastic.redundancy=1"],
}
WARM_UP = 3


def median_step_s(settings: list[str], steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "run.toml", Path(folder) / "run"
        path.write_text(CONFIG)
        command = [sys.executable, "-m", "holdfast.launch.cli", "train", str(path)]
        command += ["--out", str(run), "--set", f"train.steps={WARM_UP + steps}"]
        for setting in (*settings, "elastic.local_nodes=2"):
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (run / "metrics.jsonl").read_text().splitlines()[WARM_UP:]
        return statistics.median(json.loads(line)["step_s"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    rows = alternate(
        {
            name: lambda settings=settings: median_step_s(settings, given.steps)
            for name, settings in WAYS.items()
        },
        given.repetitions,
    )
    fixed = rows[0].median_s
    report(
        "a step with nothing lost, two data-parallel workers",
        rows,
        {row.name: fixed for row in rows},
        json_path=given.json,
        note=f"each number is the median of {given.steps} steps of a run; ratio: to fixed ranks",
    )


if __name__ == "__main__":
    main()
