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


def _run_script(
    path: Path, folder: Path, *arguments: str, code: int = 0, state: str = "RUNNING"
) -> tuple[int, str]:
    """The exit code and output of a script; its srun tells its arguments, and ends with `code`."""
    programs = {
        "srun": f'printf "%s\\n" "$@"; exit {code}',
        "squeue": f"echo {state}",
        "scontrol": 'echo "scontrol $*"',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        [str(path), *arguments],
        cwd=EXAMPLES.parent,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.mark.mp
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_starts_the_command_with_a_configuration_that_exists(
    path: Path, tmp_path: Path
) -> None:
    code, output = _run_script(path, tmp_path)
    assert code == 0
    options, _, command = output.partition("holdfast\n")
    assert options.splitlines() == ["--no-kill", "--kill-on-bad-exit=0"]
    verb, config, *rest = command.splitlines()
    assert (verb, rest) == ("train", ["--out", "runs/cluster"])
    assert EXAMPLES.parent / config in CONFIGS


@pytest.mark.mp
@pytest.mark.parametrize(
    ("code", "state", "finished", "ends_with", "again"),
    [
        (3, "RUNNING", False, 3, True),
        (137, "RUNNING", False, 137, True),
        (137, "RUNNING", True, 0, False),
        (3, "CANCELLED", False, 3, False),
        (2, "RUNNING", False, 2, False),
    ],
)
def test_a_job_begins_again_if_its_run_can_go_on_and_nobody_cancelled_it(
    tmp_path: Path, code: int, state: str, finished: bool, ends_with: int, again: bool
) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "run_finished"}\n' * finished)
    found, output = _run_script(
        EXAMPLES / "slurm.sh", tmp_path, "c", str(tmp_path), code=code, state=state
    )
    assert found == ends_with
    assert ("scontrol requeue 7" in output) == again
