"""Whatever way a run ends, nothing of it is left among temporary files after the next start."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.trainer.run import memory_root
from support.runs.commands import holdfast
from support.runs.elastic_runs import LONGEST_S, ElasticRun, Starter

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
pytestmark = [pytest.mark.mp]


@pytest.fixture
def start(tmp_path: Path, temporary: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files of the processes that a test starts."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    return place


def _descendants(pid: int) -> list[int]:
    """The pidfds of a process and of those below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = [os.pidfd_open(pid)]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [*found, *(fd for child in children for fd in _descendants(int(child)))]


def _kill_agent(run: ElasticRun) -> None:
    os.kill(run.agent(1), signal.SIGKILL)
    run.wait_for_members(1)
    run.process.send_signal(signal.SIGINT)


def _kill_workers(run: ElasticRun) -> None:
    for rank in (0, 1):
        run.kill(rank)


ENDS: dict[str, Callable[[ElasticRun], None]] = {
    "the command is killed": lambda run: run.process.kill(),
    "an agent is killed": _kill_agent,
    "its last step": lambda run: None,
    "SIGTERM": lambda run: run.process.send_signal(signal.SIGTERM),
    "all workers are killed": _kill_workers,
}


SHORT = ("the command is killed", "an agent is killed")
"""The ends that are tried outside `make soak`: those after which something is left."""


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("end", list(ENDS) if SOAK else SHORT)
def test_nothing_is_left_after_the_next_start(start: Starter, temporary: Path, end: str) -> None:
    nodes = 2 if end == "an agent is killed" else 1  # copies in memory are for one node
    steps = 8 if end == "its last step" else 100_000
    run = start(
        train={"steps": steps, "recompute": "full"},
        parallel={"data": 2},
        checkpoint={"memory_every": 2 * (nodes == 1)},
        elastic={"respawn": False, "local_nodes": nodes},
    )
    run.wait_for_step(3)
    assert list(temporary.iterdir()), "the run makes nothing there: this test would see nothing"
    processes = _descendants(run.process.pid)
    ENDS[end](run)
    run.finish()
    for descriptor in processes:
        assert select.select([descriptor], [], [], LONGEST_S)[0]
        os.close(descriptor)
    copies = memory_root(run.root)
    assert copies is not None
    again = start.start(
        start.write("again", train={"steps": 2}, parallel={"data": 2}, elastic={"enabled": False}),
        run.root.name,
        *("--resume", "none"),
    )
    assert again.finish() == 0, again.output()
    assert list(temporary.iterdir()) == []
    assert not copies.exists()
    assert not [path for path in run.root.rglob("*") if ".partial" in path.name]
    assert not (run.root / "elastic.json").exists()


def test_a_check_leaves_nothing_among_temporary_files(config: Path, temporary: Path) -> None:
    done = holdfast(config.parent, "check", str(config), "--set", "train.recompute=full")
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
