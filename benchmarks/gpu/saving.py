"""What a checkpoint costs a run: `holdfast train` that saves, and the times that it writes down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = """
[model]
family = "llama"
layers = {layers}
hidden = {hidden}
vocab = 512
[data]
kind = "synthetic"
[train]
steps = {steps}
seq_len = {seq_len}
global_batch = 8
micro_batch = 4
device = "{device}"
precision = "bf16"
[checkpoint]
every = {every}
keep = 2
[log]
tensorboard = false
"""


def run(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """The stall, the time and the size of each checkpoint, and the steps around it."""
    layers, hidden, seq_len = (2, 32, 16) if tiny else (16, 1536, 1024)
    steps, every = (4, 2) if tiny else (60, 20)
    config = folder / "run.toml"
    config.write_text(
        CONFIG.format(
            layers=layers, hidden=hidden, seq_len=seq_len, steps=steps, every=every, device=device
        )
    )
    command = (sys.executable, "-m", "holdfast.launch.cli", "train", str(config))
    done = subprocess.run(
        [*command, "--out", str(folder / "run")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    events = _lines(folder / "run" / "events.jsonl")
    saves = [event for event in events if "stall_s" in event]
    steps_s = sorted(float(line["step_s"]) for line in _lines(folder / "run" / "metrics.jsonl"))
    return {
        "checkpoints": [
            {key: save[key] for key in ("step", "tier", "bytes", "stall_s", "total_s")}
            for save in saves
        ],
        "median s a step": steps_s[len(steps_s) // 2],
        "largest s a step": steps_s[-1],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
