"""Elastic can be taken off: a run without it needs, and imports, none of its two folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast import _native, trainer

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
steps = 4
seq_len = 16
global_batch = 8
micro_batch = 1
[parallel]
data = 2
[elastic]
straggler_every = 2
[log]
tensorboard = false
"""
MAIN = """
import os, sys
from importlib.machinery import PathFinder
from pathlib import Path

tree = sys.argv.pop(1)
if tree != "installed":
    # No finder of an installation by its name; `holdfast` is the tree alone.
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
    sys.meta_path.append(PathFinder)
    sys.path.insert(0, tree)

import holdfast.trainer.worker as worker

run_worker = worker.run_worker

def run_and_tell(config, world, run, **named):
    code = run_worker(config, world, run, **named)
    (run.root / f"modules-{world.rank}").write_text("\\n".join(sys.modules))
    return code

worker.run_worker = run_and_tell
from holdfast.launch.cli import main

try:
    main()
finally:
    Path("modules-main").write_text("\\n".join(sys.modules))
"""
TAKEN_OFF = ("holdfast.elastic", "holdfast.trainer.elastic")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration, and with a program that runs the command."""
    (tmp_path / "run.toml").write_text(CONFIG)
    (tmp_path / "command.py").write_text(MAIN)
    return tmp_path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The package as links to its source, without the two folders."""
    source = Path(trainer.__file__ or "").parent.parent
    package = tmp_path / "tree" / "holdfast"
    (package / "trainer").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("parallel", "checkpoint", "launch"):
        (package / name).symlink_to(source / name)
    for path in (source / "trainer").iterdir():
        if path.name not in ("elastic", "__pycache__"):
            (package / "trainer" / path.name).symlink_to(path)
    compiled = Path(_native.__file__ or "")
    (package / compiled.name).symlink_to(compiled)
    return tmp_path / "tree"


def holdfast(folder: Path, tree: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    foreign = ("SLURM_", "OMPI_", "PMI_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return subprocess.run(
        [sys.executable, "command.py", tree, *arguments],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )


def bits(run: Path) -> list[tuple[str, str]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["loss_hex"], line["grad_norm_hex"]) for line in lines]


def digest(run: Path) -> str:
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return next(e["parameter_digest"] for e in events if e["event"] == "run_finished")


def imported(path: Path) -> list[str]:
    """The modules of the two folders that a process has imported."""
    modules = path.read_text().split()
    assert "holdfast.trainer.loop" in modules
    return [name for name in modules if name.startswith(TAKEN_OFF)]


@pytest.mark.mp
def test_a_run_without_elastic_imports_nothing_of_it_and_needs_nothing_of_it(
    folder: Path, tree: Path
) -> None:
    whole = holdfast(folder, "installed", "train", "run.toml", "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    for process in ("modules-main", "whole/modules-0", "whole/modules-1"):
        assert imported(folder / process) == []
    bare = holdfast(folder, str(tree), "train", "run.toml", "--out", "bare")
    assert bare.returncode == 0, bare.stderr
    assert len(bits(folder / "whole")) == 4
    assert bits(folder / "bare") == bits(folder / "whole")
    assert digest(folder / "bare") == digest(folder / "whole")
    for arguments in (["--help"], ["plan", "run.toml", "--lost", "1"], ["verify", "bare"]):
        asked = holdfast(folder, str(tree), *arguments)
        assert asked.returncode == 0, asked.stderr


@pytest.mark.mp
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["train", "run.toml", "--set", "elastic.enabled=true"], "elastic.enabled = true"),
        (["replay", "runs/run-1"], "holdfast replay"),
        (["join", "runs/run-1"], "holdfast join"),
    ],
    ids=["train", "replay", "join"],
)
def test_what_elastic_lacks_is_said_in_one_line(
    folder: Path, tree: Path, arguments: list[str], what: str
) -> None:
    refused = holdfast(folder, str(tree), *arguments)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"holdfast: {what}: this installation has no holdfast.elastic and no ")
