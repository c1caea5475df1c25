"""Trainings of examples/tiny.toml on one rank with other keys, by their held-out losses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_RANK = {
    "parallel.data": 1,
    "parallel.pipeline": 1,
    "parallel.virtual": 1,
    "parallel.schedule": "1f1b",
    "elastic.enabled": "false",
    "elastic.chaos": "[]",
    "log.tensorboard": "false",
    "log.trace_steps": "[]",
}


def arguments(description: str | None, steps: int, every: int) -> argparse.Namespace:
    """The command's steps, steps between evaluations, seeds, rates, and file for results.

    Args:
        steps, every: the steps, and those between evaluations, unless others are given.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--every", type=int, default=every)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", help="the learning rates to try")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def held_out_losses(
    keys: Mapping[str, object], rate: float, seed: int, steps: int, every: int
) -> dict[int, float]:
    """The held-out loss of one run, by step.

    Args:
        keys: those of the configuration that differ from the example's.
        rate: the learning rate, which falls to a tenth.
        every: the steps between evaluations.
    """
    chosen = {
        "optimizer.lr": rate,
        "optimizer.min_lr": rate / 10,
        "train.seed": seed,
        "train.steps": steps,
        "train.eval_every": every,
        "train.eval_batches": 8,
        **ONE_RANK,
        **keys,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "holdfast.launch.cli", "train"]
        command += [str(ROOT / "examples/tiny.toml"), "--out", f"{folder}/run"]
        command += [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run/events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {event["step"]: event["loss"] for event in found if event["event"] == "evaluated"}
