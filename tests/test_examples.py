"""Each example is a configuration that can be planned, or a script whose commands are ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.mp
def test_the_manifest_for_kubernetes_starts_the_command_with_a_layout_for_its_pods(
    tmp_path: Path,
) -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    (service, job) = documents
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["command"] == ["bash", "-c"]
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", *container["args"]],
        cwd=EXAMPLES.parent,
        env={**os.environ, "PATH": path, "JOB_COMPLETION_INDEX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    given = done.stdout.splitlines()
    config = load_config(EXAMPLES.parent / given[given.index("-m") + 2], ["parallel.data=1"])
    nodes, processes = (int(given[given.index(n) + 1]) for n in ("--nnodes", "--nproc-per-node"))
    assert nodes == job["spec"]["completions"]
    assert nodes * processes == config.parallel.ranks
    assert container["resources"]["limits"]["nvidia.com/gpu"] == processes
    host = given[given.index("--master-addr") + 1]
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert given[given.index("--node-rank") + 1] == "1"


def test_the_image_is_built_of_files_that_exist() -> None:
    text = (EXAMPLES / "Dockerfile").read_text()
    named = set(re.findall(r"/source/(requirements/\S+)", text))
    assert named == {"requirements/build.txt", "requirements/base.txt"}
    assert all((EXAMPLES.parent / path).exists() for path in named)
