"""Elastic can be taken off: a run without it needs, and imports, none of its two folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
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
import json, os, sys
from importlib.machinery import PathFinder
from pathlib import Path

tree, commands = sys.argv[1], json.loads(sys.argv[2])
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

codes = []
for number, arguments in enumerate(commands):
    errors = os.open(f"errors-{number}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(errors, 2)
    os.close(errors)
    sys.argv = ["holdfast", *arguments]
    try:
        codes.append(main())
    except SystemExit as end:
        codes.append(end.code or 0)
Path("modules-main").write_text("\\n".join(sys.modules))
Path("codes").write_text(json.dumps(codes))
"""
TAKEN_OFF = ("holdfast.elastic", "holdfast.trainer.elastic")
TRAIN = ["train", "run.toml", "--out", "run"]
WORKS = (TRAIN, ["--help"], ["plan", "run.toml", "--lost", "1"], ["verify", "run"])
LACKS = {
    "elastic.enabled = true": ["train", "run.toml", "--set", "elastic.enabled=true"],
    "holdfast replay": ["replay", "runs/run-1"],
    "holdfast join": ["join", "runs/run-1"],
}
"""By what is refused: the command."""


@dataclass(frozen=True)
class Done:
    """Commands that one process has run in a folder of its own."""

    folder: Path
    codes: list[int]

    def told(self, number: int) -> str:
        """What a command has written to its standard error."""
        return (self.folder / f"errors-{number}.txt").read_text()


def package_without(folder: Path) -> Path:
    """The package as links to its source, without the two folders."""
    source = Path(trainer.__file__ or "").parent.parent
    package = folder / "tree" / "holdfast"
    (package / "trainer").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("parallel", "checkpoint", "launch"):
        (package / name).symlink_to(source / name)
    for path in (source / "trainer").iterdir():
        if path.name not in ("elastic", "__pycache__"):
            (package / "trainer" / path.name).symlink_to(path)
    compiled = Path(_native.__file__ or "")
    (package / compiled.name).symlink_to(compiled)
    return folder / "tree"


def holdfast(folder: Path, tree: str, *commands: list[str]) -> Done:
    """Run commands one after the other in a fresh process."""
    (folder / "run.toml").write_text(CONFIG)
    (folder / "command.py").write_text(MAIN)
    foreign = ("SLURM_", "OMPI_", "PMI_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(
        [sys.executable, "command.py", tree, json.dumps(commands)],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = "".join(path.read_text() for path in sorted(folder.glob("errors-*.txt")))
    assert (folder / "codes").exists(), done.stderr + told
    return Done(folder, json.loads((folder / "codes").read_text()))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What works without the two folders, and then what is refused."""
    folder = tmp_path_factory.mktemp("bare")
    return holdfast(folder, str(package_without(folder)), *WORKS, *LACKS.values())


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
    bare: Done, tmp_path: Path
) -> None:
    whole = holdfast(tmp_path, "installed", TRAIN)
    assert whole.codes == [0], whole.told(0)
    for process in ("modules-main", "run/modules-0", "run/modules-1"):
        assert imported(whole.folder / process) == []
    for number, arguments in enumerate(WORKS):
        assert bare.codes[number] == 0, (arguments, bare.told(number))
    assert len(bits(whole.folder / "run")) == 4
    assert bits(bare.folder / "run") == bits(whole.folder / "run")
    assert digest(bare.folder / "run") == digest(whole.folder / "run")


@pytest.mark.mp
@pytest.mark.parametrize("what", LACKS)
def test_what_elastic_lacks_is_said_in_one_line(bare: Done, what: str) -> None:
    number = len(WORKS) + list(LACKS).index(what)
    assert bare.codes[number] == 2
    (line,) = bare.told(number).splitlines()
    assert line.startswith(f"holdfast: {what}: this installation has no holdfast.elastic and no ")
