"""Saving beside training: small arenas, slow ranks, and what happens when the next save is due."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.distributed import Store

from holdfast.checkpoint import Checkpointer, load
from holdfast.checkpoint.saving.arena import SLAB_BYTES
from support.processes.cluster import Cluster, WorkerFailed
from support.runs.small_runs import events_of, make_config, metrics_of, world_size_of

STEPS = 8


def _program() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(700, 700) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def test_a_state_larger_than_the_arena_streams_through_it(tmp_path: Path) -> None:
    """47 MB through 8 MiB, with updates that overwrite the state as soon as the fence lets them."""
    model, optimizer = _program()
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(tmp_path, state, arena_bytes=1, keep=0) as checkpointer:
        expected: list[tuple[dict[str, torch.Tensor], list[torch.Tensor]]] = []
        for step in range(4):
            weights = {n: p.detach().clone() for n, p in model.named_parameters()}
            moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
            expected.append((weights, moments))
            checkpointer.save(step)
            assert checkpointer._manager._saver is not None
            assert checkpointer._manager._saver._resources.arena.nbytes == 2 * SLAB_BYTES
            optimizer.step()
        checkpointer.wait()
    for step, (weights, moments) in enumerate(expected):
        again, other = _program()
        load(tmp_path / f"step-{step:08d}", {"model": again, "optimizer": other})
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter, weights[name]), (step, name)
        for parameter, moment in zip(again.parameters(), moments, strict=True):
            assert torch.equal(other.state[parameter]["exp_avg"], moment)


def train_with_a_slow_rank(
    rank: int,
    world_size: int,
    store: Store,
    *,
    config: dict,
    root: str,
    slow: int,
    seconds: float,
    times: int,
) -> None:
    """The training loop, where one rank takes its time to finish its first files."""
    from holdfast.checkpoint.saving.save import Save
    from support.runs import small_runs

    finish = Save._finish_file
    left = times

    def slowly(self: Save, *arguments: Any) -> int:
        nonlocal left
        if rank == slow and left > 0:
            left -= 1
            time.sleep(seconds)
        return finish(self, *arguments)

    Save._finish_file = slowly  # type: ignore[method-assign]
    try:
        small_runs.train_in(rank, world_size, store, config=config, root=root)
    finally:
        Save._finish_file = finish  # type: ignore[method-assign]


def _run(
    cluster: Cluster, root: Path, checkpoint: dict[str, Any], seconds: float, times: int = 99
) -> None:
    config = make_config(
        model={"layers": 2},
        train={"steps": STEPS, "global_batch": 4},
        parallel={"data": 2, "pipeline": 2},
        checkpoint=checkpoint,
    )
    cluster.run(
        f"{__name__}:train_with_a_slow_rank",
        world_size_of(config),
        config=msgspec.to_builtins(config),
        root=str(root),
        slow=3,
        seconds=seconds,
        times=times,
    )


@pytest.mark.mp
def test_a_rank_that_is_stuck_in_a_save_costs_the_checkpoint_and_is_named(
    cluster: Cluster, tmp_path: Path
) -> None:
    _run(cluster, tmp_path, {"every": 3, "timeout_s": 3.0}, 5.0, times=1)
    assert len(metrics_of(tmp_path)) == STEPS, "training went on to its end"
    failed = events_of(tmp_path, "checkpoint_failed")
    assert failed[0]["step"] == 3
    assert "rank 3 (sync)" in failed[0]["error"]
    assert events_of(tmp_path, "checkpoint_committed")[-1]["step"] == STEPS
    assert events_of(tmp_path, "run_finished")


@pytest.mark.mp
def test_a_run_whose_last_step_is_not_saved_fails(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="all steps are done, but the last is not saved"):
        _run(cluster, tmp_path, {"timeout_s": 1.0, "retry_s": 0.0}, 3.0)
    assert len(metrics_of(tmp_path)) == STEPS


@pytest.mark.mp
def test_a_save_that_is_due_too_soon_is_left_out_or_waited_for(
    cluster: Cluster, tmp_path: Path
) -> None:
    _run(cluster, tmp_path / "skip", {"every": 1, "policy": "skip", "keep": 0}, 0.3)
    skipped = [event["step"] for event in events_of(tmp_path / "skip", "checkpoint_skipped")]
    saved = [event["step"] for event in events_of(tmp_path / "skip", "checkpoint_committed")]
    assert skipped
    assert sorted(skipped + saved) == list(range(1, STEPS + 1))
    assert saved[-1] == STEPS
    _run(cluster, tmp_path / "wait", {"every": 2, "policy": "wait", "keep": 0}, 0.3)
    waited = [event["step"] for event in events_of(tmp_path / "wait", "checkpoint_committed")]
    assert waited == [2, 4, 6, STEPS]
    lost = [line["loss_hex"] for line in metrics_of(tmp_path / "skip")]
    assert lost == [line["loss_hex"] for line in metrics_of(tmp_path / "wait")]


@pytest.mark.mp
def test_a_checkpoint_after_so_many_seconds(cluster: Cluster, tmp_path: Path) -> None:
    _run(cluster, tmp_path, {"every_seconds": 0.001}, 0.0)
    assert len(events_of(tmp_path, "checkpoint_committed")) > 1


@pytest.mark.mp
def test_what_a_save_cost_is_recorded_by_rank(cluster: Cluster, tmp_path: Path) -> None:
    _run(cluster, tmp_path, {"every": 4}, 1.0)
    event = events_of(tmp_path, "checkpoint_committed")[0]
    assert event["tier"] == "disk"
    assert set(event["ranks"]) == {"0", "1", "2", "3"}
    assert set(event["ranks"]["0"]) == {"stall_s", "copy_s", "write_s", "sync_s"}
    assert (event["slowest_rank"], event["slowest_phase"]) == (3, "sync")
    assert event["bytes"] == sum(
        path.stat().st_size
        for path in Path(event["path"].replace("00000004", "00000008")).iterdir()
        if path.suffix == ".safetensors"
    )
    assert 1.0 <= event["imbalance"] < 2.0
