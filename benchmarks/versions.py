"""This version beside another one: is a step, the executor, starting or recovering slower than it
was?

Both run the same configurations in turn, each from its own checkout with its own `.venv`:

    python benchmarks/versions.py OTHER_CHECKOUT [--repetitions 5] [--only step,start] \\
        [--json out.json]

- step: median seconds of a step of one process, exact mode;
- step of 4 ranks: the same over two replicas of a pipeline of two;
- start: from the command to the first committed step, 4 workers;
- recovery: what a run writes of a worker that is killed in the midst of a step
  (`recovered.total_s`);
- executor: `executor.py`'s times of each checkout, where compute is a sleep.
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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))

from harness import Measurement, alternate, report

HERE = Path(__file__).resolve().parent.parent
MODEL = """
[model]
family = "llama"
layers = 4
hidden = {hidden}
heads = 8
kv_heads = 4
intermediate = {intermediate}
vocab = 512
[log]
tensorboard = false
"""
STEP = """
[train]
steps = 24
seq_len = 128
global_batch = 8
micro_batch = 2
"""
FOUR = """
[parallel]
data = 2
pipeline = 2
"""
START = """
[train]
steps = 1
seq_len = 32
global_batch = 8
micro_batch = 1
"""
RECOVERY = """
[train]
steps = 30
seq_len = 64
global_batch = 8
micro_batch = 1
[parallel]
data = 4
[elastic]
enabled = true
local_nodes = 4
heartbeat_timeout_ms = 2000
[[elastic.chaos]]
fault = "kill"
rank = 2
step = 15
phase = "reduce"
"""
WARM_STEPS = 4


@dataclass(frozen=True, slots=True)
class Version:
    """A checkout whose `.venv` has it installed."""

    name: str
    root: Path

    def train(self, config: str, out: Path) -> subprocess.Popen[bytes]:
        out.parent.mkdir(parents=True, exist_ok=True)
        path = out.with_suffix(".toml")
        path.write_text(config)
        return subprocess.Popen(
            [
                *(str(self.root / ".venv/bin/python"), "-m", "holdfast.launch.cli", "train"),
                *(str(path), "--out", str(out)),
            ],
            cwd=out.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def step_seconds(version: Version, config: str, out: Path) -> float:
    """The median time of a run's steps, without the first ones."""
    assert version.train(config, out).wait() == 0
    times = [float(str(line["step_s"])) for line in lines_of(out / "metrics.jsonl")]
    return statistics.median(times[WARM_STEPS:])


def start_seconds(version: Version, config: str, out: Path) -> float:
    """From the command to the first line of metrics."""
    begin = time.perf_counter()
    process = version.train(config, out)
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert process.poll() in (None, 0), f"{version.name}: exit code {process.returncode}"
        time.sleep(0.002)
    seconds = time.perf_counter() - begin
    process.wait()
    return seconds


def recovery_seconds(version: Version, config: str, out: Path) -> float:
    """What the run says that its first recovery took, from noticing the loss to going on."""
    assert version.train(config, out).wait() == 0
    found = [line for line in lines_of(out / "events.jsonl") if line["event"] == "recovered"]
    return float(str(found[0]["total_s"]))


def executor_seconds(version: Version, out: Path) -> dict[str, float]:
    """The times of this project's executor by schedule."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".json")
    subprocess.run(
        [
            *(str(version.root / ".venv/bin/python"), "benchmarks/executor.py"),
            *("--repetitions", "1", "--json", str(path)),
        ],
        cwd=version.root,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    rows = json.loads(path.read_text())["rows"]
    return {str(row["name"]): float(row["median_s"]) for row in rows}


Measure = Callable[[Version, str, Path], float]
CONTESTS: dict[str, tuple[Measure, str]] = {
    "step": (step_seconds, MODEL.format(hidden=256, intermediate=688) + STEP),
    "step of 4 ranks": (step_seconds, MODEL.format(hidden=128, intermediate=344) + STEP + FOUR),
    "start": (start_seconds, MODEL.format(hidden=64, intermediate=176) + START + FOUR),
    "recovery": (recovery_seconds, MODEL.format(hidden=64, intermediate=176) + RECOVERY),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("other", type=Path, help="a checkout of another version, set up")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default="", help="contests by name, with commas between")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    versions = [Version("before", arguments.other.resolve()), Version("now", HERE)]
    wanted = arguments.only.split(",") if arguments.only else [*CONTESTS, "executor"]
    rows: list[Measurement] = []
    baseline: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        count = iter(range(1_000_000))

        def runner(version: Version, measure: Measure, config: str) -> Callable[[], float]:
            return lambda: measure(version, config, Path(name) / f"run-{next(count)}")

        for contest in [c for c in CONTESTS if c in wanted]:
            measure, config = CONTESTS[contest]
            found = alternate(
                {f"{contest}, {v.name}": runner(v, measure, config) for v in versions},
                arguments.repetitions,
            )
            rows += found
            baseline |= {row.name: found[0].median_s for row in found}
        if "executor" in wanted:
            times: dict[str, list[float]] = {}
            for _ in range(arguments.repetitions):
                for version in versions:
                    seconds = executor_seconds(version, Path(name) / f"executor-{next(count)}")
                    for schedule, value in seconds.items():
                        times.setdefault(f"{schedule}, {version.name}", []).append(value)
            for label in times:
                row = Measurement(label, tuple(times[label]))
                before = f"{label.rpartition(', ')[0]}, before"
                rows.append(row)
                baseline[label] = statistics.median(times[before])
    report(
        "this version beside another",
        rows,
        baseline,
        json_path=arguments.json,
        note="ratio = time / before",
    )


if __name__ == "__main__":
    main()
