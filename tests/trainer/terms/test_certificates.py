"""A checkpoint says by which arithmetic it was made; resuming it with another one is told."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from holdfast.checkpoint.stores.registry import read_manifest
from holdfast.trainer.run import CERTIFICATE
from support.runs.commands import CONFIG, HOLDFAST, environment, holdfast

pytestmark = pytest.mark.mp
ALONE = (
    CONFIG.replace("data = 2\npipeline = 2", "data = 1").replace("batch = 8", "batch = 2")
    + "[checkpoint]\nevery = 2\n"
)
OTHER = {"ATEN_CPU_CAPABILITY": "default"}
"""Torch's kernels without vector instructions: on most machines they give other bits."""


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command, in a process that imports torch anew if its environment is another."""
    if not env:
        done = holdfast(folder, *arguments)
        done.check_returncode()
        return done
    return subprocess.run(
        [*HOLDFAST, *arguments],
        cwd=folder,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )


def hashes(told: str) -> dict[str, str]:
    return {line.rsplit(maxsplit=1)[0].strip(): line.split()[-1] for line in told.splitlines()[1:]}


def certificate(folder: Path, step: int) -> dict[str, str]:
    """What a checkpoint says of the arithmetic by which it was made."""
    scalars = read_manifest(folder / f"run/checkpoints/step-{step:08d}").scalars
    return json.loads(scalars[CERTIFICATE])


def test_a_run_that_goes_on_with_other_arithmetic_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(ALONE)
    own = hashes(run(tmp_path, "check", "run.toml", "--certificate").stdout)
    steps = ("--out", "run", "--set", "train.steps=4")
    run(tmp_path, "train", "run.toml", *steps)
    assert certificate(tmp_path, 4) == own
    same = run(tmp_path, "train", "run.toml", "--out", "run", "--set", "train.steps=5")
    assert "other bits" not in same.stdout + same.stderr
    changed = run(tmp_path, "train", "run.toml", "--out", "run", **OTHER)
    other = certificate(tmp_path, 6)
    differing = [kind for kind in own if own[kind] != other[kind]]
    if not differing:
        pytest.skip("this processor has no vector instructions that torch uses")
    told = [line for line in changed.stdout.splitlines() if "other bits" in line]
    assert len(told) == 1, changed.stdout + changed.stderr
    assert f"({', '.join(differing)})" in told[0]
    assert "step-00000005" in told[0]
