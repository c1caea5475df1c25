"""A full disk, a clock that goes back, foreign lines: a run takes all steps and says what lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.processes.forked_command import ForkedCommand
from support.runs.commands import CONFIG, HOLDFAST, environment, holdfast, lines_of

STEPS, STEP_S = 40, 0.1
"""Of a run that is still under way when its disk is full again."""
PLAIN = ("--set", "parallel.pipeline=1", "--set", "parallel.data=1")
ELASTIC = ("--set", "parallel.pipeline=1", "--set", "elastic.enabled=true")
DEAF = """
import os
import signal
import sys

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""
FORSAKEN = """
import itertools
import pwd
import time

def nobody(*_):
    raise KeyError("no entry")

pwd.getpwuid = pwd.getpwnam = nobody

now, calls = time.time, itertools.count()
time.time = lambda: now() - 3600 * next(calls)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a disk that is small enough to fill")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte of room on a disk. Returns the file to remove."""
    junk = disk / "junk"
    with junk.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return junk


def pace() -> None:
    """Have each step last for a while, without a processor."""
    from holdfast.trainer.step.training import Training

    compute = Training.compute

    def slow(self: Training, *arguments: Any) -> Any:
        time.sleep(STEP_S)
        return compute(self, *arguments)

    Training.compute = slow  # type: ignore[method-assign]


@pytest.mark.mp
@pytest.mark.parametrize("layout", [PLAIN, ELASTIC], ids=["plain", "elastic"])
def test_a_run_whose_disk_fills_takes_all_steps_and_tells_what_the_records_lack(
    config: Path, small_disk: Path, layout: tuple[str, ...]
) -> None:
    """After a while there is room again and what waited is written; then there is none for good."""
    run, errors = small_disk / "run", config.parent / "errors"
    started = ForkedCommand(
        ["train", str(config), "--out", str(run), *layout,
         "--set", f"train.steps={STEPS}", "--set", "log.trace_steps=[]",
         "--set", f"checkpoint.path={config.parent / 'kept'}"],
        config.parent / "printed",
        environment(),
        errors=errors,
        before="test_hostile_machine:pace",
    )  # fmt: skip

    def wait_for(word: str) -> None:
        while word not in errors.read_text():
            assert started.poll() is None, f"it was not told: {errors.read_text()}"
            time.sleep(0.02)

    try:
        metrics, end_s = run / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end_s:
            time.sleep(0.02)
        junk = fill(small_disk)
        written = metrics.read_text().count("\n")
        assert started.poll() is None, "the run ended before its disk was full"
        wait_for("cannot be written")
        junk.unlink()
        wait_for("the records that had to wait are written")
        said = errors.read_text()
        assert said.count("cannot be written") == 1
        assert "lacks" not in said
        whole = metrics.read_text().rpartition("\n")[0].splitlines()
        assert len(whole) > written
        assert [json.loads(line)["step"] for line in whole] == list(range(1, len(whole) + 1))
        fill(small_disk)
        assert started.poll() is None, "the run ended before its disk was full again"
        code = started.wait(timeout=200)
    finally:
        started.kill()
    said = errors.read_text()
    assert code == 0, said
    assert "Traceback" not in said
    steps = [line["step"] for line in lines_of(metrics)]
    assert (config.parent / "kept" / f"step-{STEPS:08d}" / "manifest.json").exists()
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < STEPS
    assert f"{metrics} lacks the last {STEPS - len(steps)} records" in said


@pytest.mark.mp
@pytest.mark.parametrize("layout", [PLAIN, ELASTIC], ids=["plain", "elastic"])
def test_a_clock_that_goes_back_a_nameless_user_a_deaf_parent_and_a_loud_torch_change_nothing(
    config: Path, layout: tuple[str, ...]
) -> None:
    (config.parent / "sitecustomize.py").write_text(FORSAKEN)
    variables = environment(
        PYTHONPATH=str(config.parent),
        PYTHONOPTIMIZE="1",
        TORCH_DISTRIBUTED_DEBUG="DETAIL",
        TORCH_CPP_LOG_LEVEL="INFO",
    )
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HOLDFAST_CACHE"):
        variables.pop(name, None)
    (config.parent / "text").write_text("a text of some words\n\n" * 200)
    (config.parent / "tmp").mkdir()
    variables["TMPDIR"] = str(config.parent / "tmp")
    data = ("--set", "data.kind=text", "--set", 'data.path=["text"]')
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            DEAF,
            *HOLDFAST,
            "train",
            str(config),
            "--out",
            "run",
            *layout,
            *data,
            "--set",
            "checkpoint.every=2",
        ],
        cwd=config.parent,
        env=variables,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    run = config.parent / "run"
    assert [line["step"] for line in lines_of(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    times = [event["time"] for event in lines_of(run / "events.jsonl")]
    assert min(times) < times[0] - 3600, "the clock has not gone back"
    assert (run / "checkpoints" / "step-00000006").exists()
    (cache,) = (config.parent / "tmp").iterdir()
    assert cache.name == f"holdfast-cache-{os.getuid()}"
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.mp
@pytest.mark.parametrize(
    ("command", "most"),
    [
        pytest.param([*HOLDFAST, "train", *PLAIN], 2, id="plain-2"),
        pytest.param([*HOLDFAST, "train", *PLAIN], 9, id="plain-9"),
        pytest.param([*HOLDFAST, "train", *ELASTIC], 5, id="elastic-5"),
        pytest.param([*HOLDFAST, "train", *ELASTIC], 9, id="elastic-9"),
        pytest.param([*HOLDFAST, "check"], 2, id="check-2"),
        pytest.param([*HOLDFAST, "check"], 5, id="check-5"),
        pytest.param([sys.executable, "-m", "holdfast.trainer", *PLAIN], 2, id="worker-2"),
        pytest.param([sys.executable, "-m", "holdfast.trainer", *PLAIN], 5, id="worker-5"),
    ],
)
def test_a_user_that_may_start_no_further_process_is_told_in_a_line(
    command: list[str], most: int
) -> None:
    alone = ["setpriv", f"--reuid={61_000 + most}", "--clear-groups"]
    reads = [f"--{kind}-caps=+dac_override,+dac_read_search" for kind in ("inh", "ambient")]
    if subprocess.run([*alone, *reads, "true"], capture_output=True).returncode:
        pytest.skip("only root can start a process of a user that has no others")
    with tempfile.TemporaryDirectory() as folder:  # one that others can enter
        os.chmod(folder, 0o777)
        Path(folder, "run.toml").write_text(CONFIG)
        done = subprocess.run(
            [*alone, *reads, "prlimit", f"--nproc={most}", *command, "run.toml"],
            cwd=folder, env=environment(), capture_output=True, text=True, timeout=90,
        )  # fmt: skip
    assert done.returncode in (1, 2)
    assert "(ulimit -u, pids.max)" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.mp
def test_a_line_of_the_metrics_that_is_no_step_does_not_end_the_next_start(config: Path) -> None:
    stopped = holdfast(
        config.parent, "train", str(config), "--out", "run", *PLAIN,
        "--set", "checkpoint.every=2", "--set", "train.stop_after=4",
    )  # fmt: skip
    assert stopped.returncode in (0, 3), stopped.stderr
    metrics = config.parent / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"note": "by another program"}\n[1, 2]\n{"step": ')
    done = holdfast(config.parent, "train", str(config), "--out", "run", *PLAIN)
    assert done.returncode == 0, done.stderr
    assert "3 lines are torn or no record of a run" in done.stdout
    assert [line["step"] for line in lines_of(metrics)] == [1, 2, 3, 4, 5, 6]
    assert "another program" in metrics.with_name("metrics.jsonl.set-aside").read_text()


@pytest.mark.mp
@pytest.mark.parametrize("layout", [(), ELASTIC], ids=["plain", "elastic"])
def test_a_machine_whose_loopback_is_down_is_told_at_once(
    config: Path, layout: tuple[str, ...]
) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no network namespaces; a kernel with user namespaces does")
    two = ("--set", "parallel.pipeline=1", "--set", "parallel.data=2", *layout)
    done = subprocess.run(
        [*alone, *HOLDFAST, "train", str(config), "--out", "run", *two],
        cwd=config.parent, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "holdfast: processes here cannot connect to each other at 127.0.0.1: Network is "
        "unreachable; bring the loopback interface up (ip link set lo up)\n"
    )
