"""What `elastic.enabled` costs while nothing is lost: step times with and without it, in turn.

Data-parallel workers on this machine through the whole command: agents, heartbeats, votes,
gradients, updates and shadows are real; compute is emulated. A micro-batch's forward pass takes
FORWARD_S and its backward pass twice that, whatever the machine does meanwhile: the small real
passes are followed by sleeping. So the ranks' steps do not depend on how many share a core, and
what is left is what the elastic layer takes of a step.

    python benchmarks/elastic_overhead.py [--repetitions 5] [--steps 20] [--workers 2] \\
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

from executor import make_sleeps_exact, sleep_until
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
seq_len = 16
global_batch = {batch}
micro_batch = 2
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
MICRO_BATCHES = 8
"""Of each worker."""
FORWARD_S = 0.019
"""As long as 512 tokens of this model take on one core; the real passes, of 32 tokens, take
less.
"""


def lasting(seconds: float, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, made to take this long."""

    def longer(*arguments: object) -> object:
        begun = time.perf_counter()
        result = method(*arguments)
        sleep_until(begun + seconds)
        return result

    return longer


def train_emulated() -> None:
    """`holdfast train` with emulated compute; workers are forked, and so inherit it."""
    from holdfast.launch.cli import main as command
    from holdfast.parallel.pipeline.runner import ModelChunkRunner as Runner

    make_sleeps_exact()
    Runner.forward = lasting(FORWARD_S, Runner.forward)  # type: ignore[method-assign]
    Runner.backward = lasting(2 * FORWARD_S, Runner.backward)  # type: ignore[method-assign]
    sys.argv[1] = "train"
    command()


def median_step_s(settings: list[str], steps: int, workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "run.toml", Path(folder) / "run"
        path.write_text(CONFIG.format(batch=2 * MICRO_BATCHES * workers))
        command = [sys.executable, __file__, "--train", str(path), "--out", str(run)]
        settings = [*settings, "elastic.local_nodes=2", f"parallel.data={workers}"]
        for setting in (*settings, f"train.steps={WARM_UP + steps}"):
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (run / "metrics.jsonl").read_text().splitlines()[WARM_UP:]
        return statistics.median(json.loads(line)["step_s"] for line in lines)


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        train_emulated()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    rows = alternate(
        {
            name: lambda settings=settings: median_step_s(settings, given.steps, given.workers)
            for name, settings in WAYS.items()
        },
        given.repetitions,
    )
    fixed = rows[0].median_s
    report(
        f"a step with nothing lost, {given.workers} data-parallel workers, emulated compute",
        rows,
        {row.name: fixed for row in rows},
        json_path=given.json,
        note=f"each number is the median of {given.steps} steps of a run; ratio: to fixed ranks",
    )


if __name__ == "__main__":
    main()
