"""The `holdfast` command in processes of its own, on one small configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from support.processes.forked_command import ForkedCommand

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
    foreign = ("SLURM_", "OMPI_", "PMI_", "TORCH_CPP_LOG_LEVEL")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return {**clean, "OMP_NUM_THREADS": "1", **extra}


def holdfast(
    folder: Path, *arguments: str, timeout_s: float = 90
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a process that need not import torch: see `ForkedCommand`."""
    with tempfile.TemporaryDirectory() as kept:
        output, errors = Path(kept) / "output", Path(kept) / "errors"
        command = ForkedCommand(arguments, output, environment(), folder=folder, errors=errors)
        try:
            code = command.wait(timeout_s)
        except subprocess.TimeoutExpired:
            command.kill()
            raise
        return subprocess.CompletedProcess(
            [*HOLDFAST, *arguments], code, output.read_text(), errors.read_text()
        )


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
