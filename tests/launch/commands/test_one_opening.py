"""Every command reads its configuration once, and opens its run by the one sequence."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from holdfast.launch import launchers, proofs
from holdfast.launch.cli import application
from holdfast.launch.commands import training
from holdfast.launch.launchers.join_file import JoinInfo
from holdfast.trainer import external_launcher
from holdfast.trainer.config import RunConfig, dump_toml
from holdfast.trainer.run import RunDirectory, RunRequest
from holdfast.trainer.worlds.world import WorldInfo
from support.runs.small_runs import make_config

pytestmark = pytest.mark.mp
LOCAL: dict[str, str] = {}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29411"}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}


@dataclass
class Recorder:
    """Counts how often the configuration is parsed, and keeps what would have been started."""

    text: str
    parsed: int = 0
    started: list[tuple[str, RunConfig]] = field(default_factory=list)

    def loads(self, text: str) -> dict[str, Any]:
        self.parsed += text == self.text
        return self.real(text)

    real = staticmethod(tomllib.loads)

    def start(self, what: str, config: RunConfig) -> int:
        self.started.append((what, config))
        return 0


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What a command starts is replaced; everything before it is as it is."""
    config = make_config(train={"steps": 2}, elastic={"min_ranks": 1})
    (tmp_path / "run.toml").write_text(dump_toml(config))
    found = Recorder(dump_toml(config))
    monkeypatch.chdir(tmp_path)
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)

    def local(config: RunConfig, run: RunDirectory, workers: int) -> int:
        return found.start(f"local {run.root} x{workers}", config)

    def elastic(config: RunConfig, run: RunDirectory) -> int:
        return found.start(f"elastic {run.root}", config)

    def external(request: RunRequest, world: WorldInfo) -> int:
        return found.start(f"worker {world.rank}", request.config)

    def task(config: RunConfig, world: WorldInfo) -> int:
        return found.start(f"task {world.rank}", config)

    def join(run: RunDirectory, config: RunConfig, info: JoinInfo, ranks: Sequence[int]) -> int:
        return found.start(f"join {list(ranks)}", config)

    monkeypatch.setattr(tomllib, "loads", found.loads)
    monkeypatch.setattr(launchers, "run_local", local)
    monkeypatch.setattr(launchers, "run_elastic", elastic)
    monkeypatch.setattr(launchers, "run_other_task", task)
    monkeypatch.setattr(launchers, "join_run", join)
    monkeypatch.setattr(launchers, "take_ranks", lambda run, count: (None, tuple(range(count))))
    monkeypatch.setattr(external_launcher, "run_external_worker", external)
    monkeypatch.setattr(proofs, "check_layout", lambda config, steps: found.start("check", config))
    return found


@pytest.mark.parametrize(
    ("arguments", "environment", "started"),
    [
        (["train", "run.toml"], LOCAL, "local runs/run-1 x1"),
        (["train", "run.toml", "--out", "there", "--resume", "none"], LOCAL, "local there x1"),
        (["train", "run.toml", "--set", "elastic.enabled=true"], LOCAL, "elastic runs/run-1"),
        (["train", "run.toml"], TORCHRUN, "worker 0"),
        (["train", "run.toml", "--set", "elastic.enabled=true"], SLURM, "task 1"),
        (["join", ".", "--ranks", "2"], LOCAL, "join [0, 1]"),
        (["check", "run.toml"], LOCAL, "check"),
        (["plan", "run.toml", "--json"], LOCAL, None),
    ],
)
def test_a_command_parses_its_configuration_once(
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    started: str | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path("config.toml").write_text(recorder.text)  # of the run that `join .` takes part in
    done = CliRunner().invoke(application(arguments[0]), arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert recorder.parsed == 1
    assert [what for what, _ in recorder.started] == ([] if started is None else [started])


def test_the_folder_keeps_the_configuration_that_the_workers_get(recorder: Recorder) -> None:
    arguments = ["train", "run.toml", "--set", "train.steps=3"]
    CliRunner().invoke(application("train"), arguments, catch_exceptions=False)
    [(_, config)] = recorder.started
    assert config.train.steps == 3
    assert Path("runs/run-1/config.toml").read_text() == dump_toml(config)


def test_commands_open_runs_by_the_one_sequence_only() -> None:
    """No second place chooses, locks or makes a run's folder."""
    root = Path(training.__file__).parent.parent.parent
    steps = ("choose_root(", "locked_run(", "open_run(", "resolve_throughput(")
    found = {
        path.relative_to(root).as_posix()
        for house in ("launch", "trainer")
        for path in (root / house).rglob("*.py")
        if any(step in path.read_text() for step in steps)
    }
    assert found == {f"trainer/run/{name}.py" for name in ("opening", "run_folder", "throughput")}
