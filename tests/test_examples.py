"""Each example is a configuration that can be planned, or a script whose commands are ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from holdfast.trainer.config import load_config
from holdfast.trainer.plan_report import plan_report

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.toml"))
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))


def test_there_are_examples_of_both_kinds() -> None:
    assert {path.name for path in CONFIGS} >= {"tiny.toml", "cluster.toml"}
    assert {path.name for path in SCRIPTS} >= {"slurm.sh"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_an_example_can_be_planned(path: Path) -> None:
    config = load_config(path)
    node = list(range(8)) if config.parallel.ranks > 8 else [config.parallel.ranks - 1]
    report = plan_report(config, lost=node, ranks_per_node=len(node))
    assert report.parameters > 100_000
    assert report.renderable() is not None


@pytest.mark.mp
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_starts_the_command_with_a_configuration_that_exists(
    path: Path, tmp_path: Path
) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        [str(path)],
        cwd=EXAMPLES.parent,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    options, _, command = done.stdout.partition("holdfast\n")
    assert options.splitlines() == ["--no-kill", "--kill-on-bad-exit=0"]
    verb, config, *rest = command.splitlines()
    assert (verb, rest) == ("train", ["--out", "runs/cluster"])
    assert EXAMPLES.parent / config in CONFIGS
