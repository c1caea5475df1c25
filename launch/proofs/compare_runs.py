"""The comparison of a run that lost ranks with a fault-free run, bit by bit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from holdfast.launch.proofs.digest_comparison import divergence
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.output import content_of, json_lines, step_of
from holdfast.trainer.reports import digests_by_step
from holdfast.trainer.run import RunDirectory, read_events


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Two runs, compared step by step."""

    steps: int
    first_difference: int | None
    """The first step with any different bit in loss, gradient norm or digests; None if there is
    none."""
    equal_parameters: bool

    @property
    def equal(self) -> bool:
        return self.first_difference is None and self.equal_parameters


def train_without_faults(run: RunDirectory) -> RunDirectory:
    """Train the same configuration in a folder of the run's, with fixed ranks and no faults.

    Raises:
        CheckpointError: the fault-free run did not finish.
    """
    folder = run.root / "undisturbed"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "holdfast.launch.cli", "train", str(run.config)),
            *("--out", str(folder), "--resume", "none"),
            *("--set", "elastic.enabled=false", "--set", "elastic.chaos=[]"),
            *("--set", f"checkpoint.path={folder / 'checkpoints'}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
        raise CheckpointError(f"the fault-free run in {folder} did not finish: {last[0]}")
    return RunDirectory(folder)


def compare_runs(run: RunDirectory, other: RunDirectory) -> RunComparison:
    """Losses, gradient norms and final parameters of two finished runs, bit by bit."""
    mine, others = bits_of(run.metrics), bits_of(other.metrics)
    differing = [s for s in sorted(mine.keys() | others.keys()) if mine.get(s) != others.get(s)]
    if where := divergence(digests_by_step(run.digests), digests_by_step(other.digests)):
        differing.append(where.step)
    return RunComparison(len(mine), min(differing, default=None), _digest(run) == _digest(other))


def bits_of(metrics: Path) -> dict[int, tuple[str, str]]:
    """By step, the loss and gradient norm as exact hexadecimal numbers."""
    lines = (line for _, line in json_lines(content_of(metrics)) if line is not None)
    return {
        step: (str(line.get("loss_hex")), str(line.get("grad_norm_hex")))
        for line in lines
        if (step := step_of(line))
    }


def _digest(run: RunDirectory) -> str:
    for event in reversed(read_events(run.events)):
        if event["event"] == "run_finished" and "parameter_digest" in event:
            return event["parameter_digest"]
    raise CheckpointError(f"{run.root} has not finished; there is nothing to compare")


def describe_comparison(comparison: RunComparison, lost: int) -> str:
    """The comparison in one line."""
    if comparison.equal:
        return (
            f"{comparison.steps} steps, {lost} ranks lost on the way: every loss and gradient "
            "norm, and all parameters at the end, are bit for bit those of a fault-free run"
        )
    if comparison.first_difference is None:
        return "losses are equal, but the parameters at the end differ from a fault-free run's"
    return f"step {comparison.first_difference} differs from a fault-free run's"


def lost_ranks(run: RunDirectory) -> int:
    """The number of times that a rank was lost."""
    return sum(event["event"] == "rank_lost" for event in read_events(run.events))
