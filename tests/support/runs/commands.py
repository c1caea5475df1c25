"""The `holdfast` command in processes of its own, on one small configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HOLDFAST = [sys.executable, "-m", "holdfast.launch.cli"]
CONFIG = """
[model]
family = "llama"
layers = 2
hidden = 32
intermediate = 48
heads = 4
kv_heads = 2
vocab = 300
[train]
steps = 6
seq_len = 16
global_batch = 8
micro_batch = 1
[parallel]
data = 2
pipeline = 2
[log]
tensorboard = false
trace_steps = [3]
"""


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI_"))}
    return {**clean, "OMP_NUM_THREADS": "1", **extra}


def holdfast(
    folder: Path, *arguments: str, timeout_s: float = 90
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HOLDFAST, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
