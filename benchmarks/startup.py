"""From the command to the first committed step, 4 workers, beside torchrun with a bare torch
script.

The bare script imports torch, forms a gloo group and does one all-reduce and one backward pass.

    python benchmarks/startup.py [--repetitions 5] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))

from harness import alternate, report

BARE = """
import os, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
layer = torch.nn.Linear(64, 64)
layer(torch.ones(4, 64)).sum().backward()
dist.all_reduce(layer.weight.grad)
if dist.get_rank() == 0:
    open(os.environ["DONE"], "w").close()
dist.barrier()
"""
CONFIG = """
[model]
family = "llama"
layers = 4
hidden = 64
heads = 4
kv_heads = 2
[train]
steps = 1
seq_len = 32
global_batch = 8
micro_batch = 1
[parallel]
data = 2
pipeline = 2
"""


def seconds_until(path: Path, command: list[str], environment: dict[str, str]) -> float:
    """From the start of a command until a file appears with something in it or empty as it is
    made.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not path.exists() or (path.suffix == ".jsonl" and not path.stat().st_size):
        if process.poll() not in (None, 0):
            raise RuntimeError(f"{command} exited with {process.returncode}")
        time.sleep(0.002)
    elapsed = time.perf_counter() - start
    process.wait()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bare.py").write_text(BARE)
        (folder / "run.toml").write_text(CONFIG)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        number = [0]

        def ours() -> float:
            number[0] += 1
            out = folder / f"run-{number[0]}"
            command = [sys.executable, "-m", "holdfast.launch.cli", "train"]
            command += [str(folder / "run.toml"), "--out", str(out)]
            return seconds_until(out / "metrics.jsonl", command, environment)

        def bare() -> float:
            number[0] += 1
            done = folder / f"done-{number[0]}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", "4", str(folder / "bare.py")]
            return seconds_until(done, command, {**environment, "DONE": str(done)})

        peer = "torchrun, bare torch script"
        rows = alternate({"holdfast train": ours, peer: bare}, arguments.repetitions)
    reference = next(row.median_s for row in rows if row.name == peer)
    report(
        "command to first step, 4 workers",
        rows,
        {row.name: reference for row in rows},
        json_path=arguments.json,
        note=f"ratio = time / {peer}",
    )


if __name__ == "__main__":
    main()
