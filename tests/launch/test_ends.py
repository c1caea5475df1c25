"""Signals and killed processes: how the command ends, and what it leaves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.trainer.run import Signals
from support.processes.forked_command import ForkedCommand
from support.runs.commands import environment, lines_of


def descendants(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {int(child) for child in children}
    return found.union(*(descendants(child) for child in found)) if found else set()


def wait_until(condition: object, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # pyrefly: ignore[not-callable]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_for_a_save(process: ForkedCommand, checkpoints: Path) -> None:
    """Ask a run for a save, and wait for it."""
    latest = checkpoints / "latest"
    before = latest.read_text() if latest.exists() else ""
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: latest.exists() and latest.read_text() != before)


@pytest.fixture
def long_run(config: Path) -> Iterator[tuple[ForkedCommand, Path]]:
    """A run that would take minutes, past its first steps."""
    run = config.parent / "long"
    process = ForkedCommand(
        ["train", str(config), "--out", str(run), "--set", "train.steps=100000"],
        config.parent / "said",
        environment(),
        errors=config.parent / "errors",
    )
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    yield process, run
    process.kill()
    process.wait()


@pytest.mark.mp
@pytest.mark.chaos
def test_a_killed_worker_ends_the_run_and_is_named(
    long_run: tuple[ForkedCommand, Path],
) -> None:
    process, run = long_run
    started = {
        event["rank"]: event["pid"]
        for event in lines_of(run / "events.jsonl")
        if event["event"] == "worker_started"
    }
    workers = descendants(process.pid)
    assert set(started.values()) == workers
    names = {rank: Path(f"/proc/{pid}/comm").read_text().strip() for rank, pid in started.items()}
    assert names == {rank: f"holdfast r{rank}" for rank in range(4)}
    os.kill(started[2], signal.SIGKILL)
    assert process.wait(timeout=30) == 3
    errors = run.with_name("errors").read_text()
    assert "rank 2 was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    wait_until(lambda: not any(alive(pid) for pid in workers))
    content = (run / "metrics.jsonl").read_text()
    assert content.endswith("\n")
    steps = [line["step"] for line in lines_of(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.mp
@pytest.mark.chaos
def test_no_worker_outlives_a_killed_command(
    long_run: tuple[ForkedCommand, Path],
) -> None:
    process, _ = long_run
    workers = descendants(process.pid)
    assert len(workers) == 4
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(pid) for pid in workers))


TORCHRUN = ["--standalone", "--nproc-per-node", "2", "-m", "holdfast.launch.cli"]


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ([], ()),
        ([], ("--set", "elastic.enabled=true", "--set", "elastic.local_nodes=2")),
        (TORCHRUN, ("--set", "parallel.data=1")),
    ],
    ids=["plain", "elastic", "torchrun"],
)
def test_an_interrupt_from_a_terminal_saves_the_step_and_says_how_to_go_on(
    config: Path, launcher: list[str], overrides: tuple[str, ...]
) -> None:
    """A terminal sends it to all processes; launcher and command pass it on to workers again."""
    run = config.parent / "long"
    options = ["--out", str(run), "--set", "train.steps=100000", *overrides]
    process = ForkedCommand(
        [*launcher, "train", str(config), *options],
        config.parent / "said",
        environment(),
        before="os:setsid",
        module="torch.distributed.run" if launcher else "",
    )
    try:
        metrics = run / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        workers = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(timeout=100)
    finally:
        process.kill()
    said = process.printed()
    last = lines_of(metrics)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"
    end = f"interrupted after step {last}, which is saved"
    assert said.count("press Ctrl-C again to end at once") == 1
    assert said.count(end) == 1
    wait_until(lambda: not any(alive(pid) for pid in workers))
    if not launcher:
        assert code == 130
        assert "Traceback" not in said
        assert f"{end}; to go on: holdfast resume {run}\n" in said
        kept = (run / "logs" / "console.log").read_text()
        assert "press Ctrl-C again to end at once" in kept
        assert end in kept


@pytest.mark.mp
def test_only_a_later_interrupt_ends_a_worker_that_no_other_process_ends() -> None:
    pid = os.fork()
    if pid == 0:
        signals = Signals()
        signals.listen(alone=True)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        if not (signals.stop and signals.save and signals.interrupt):
            os._exit(1)
        time.sleep(1.05)
        signal.raise_signal(signal.SIGINT)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130


@pytest.mark.mp
@pytest.mark.chaos
def test_termination_saves_the_last_step_and_ends(
    long_run: tuple[ForkedCommand, Path],
) -> None:
    process, run = long_run
    workers = descendants(process.pid)
    wait_for_a_save(process, run / "checkpoints")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 3
    errors = run.with_name("errors").read_text()
    assert "Traceback" not in errors
    last = lines_of(run / "metrics.jsonl")[-1]["step"]
    assert f"stopped by a signal after step {last}, which is saved" in errors
    assert (run / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"
    wait_until(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.mp
@pytest.mark.chaos
def test_a_worker_that_was_stopped_for_a_while_still_takes_part_in_saves(
    long_run: tuple[ForkedCommand, Path],
) -> None:
    process, run = long_run
    checkpoints = run / "checkpoints"
    wait_for_a_save(process, checkpoints)
    stopped = max(descendants(process.pid))
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(16)  # longer than a link of an elastic run may be silent
    os.kill(stopped, signal.SIGCONT)
    wait_for_a_save(process, checkpoints)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 3
