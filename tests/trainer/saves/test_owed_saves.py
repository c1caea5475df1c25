"""What a change of ranks makes of saves that it has given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch.distributed import PrefixStore, Store

from holdfast.trainer.config import convert_config
from holdfast.trainer.run import Resume, RunDirectory, Signals
from holdfast.trainer.saves import Checkpoints
from holdfast.trainer.step import Outcome, open_training
from holdfast.trainer.worlds.world import local_world
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config


def change_ranks(
    rank: int, world_size: int, store: Store, *, config: dict, root: str, committed: int
) -> dict[str, Any]:
    """One rank's saves before and after a change, when a save of step 10 was given up.

    Args:
        committed: what the first rank knows to be on the disk; the other one knows of nothing.
    """
    training = open_training(convert_config(config), local_world(rank, world_size), store)
    run = RunDirectory(Path(root), Resume())

    def checkpoints(name: str) -> Checkpoints:
        world, machines = local_world(rank, world_size), ["here"] * world_size
        return Checkpoints(training, world, PrefixStore(name, store), run, machines, Signals())

    before, after = checkpoints("before"), checkpoints("after")
    before._progress.saved_step = 10
    before._progress.committed_step = committed if rank == 0 else -1
    before.cancel("the ranks change")
    after.agree(before, continued=True)
    after.take_over(before)
    outcome = Outcome(1.0, 1.0, 0, 0)
    for step in (12, 13):
        after.after_step(step, outcome)
    saved = [(result.step, result.error) for result in after.finish()]
    after.close()
    return {"saved": saved, "committed": after.committed_step}


@pytest.mark.mp
@pytest.mark.parametrize(
    ("committed", "saved"), [(-1, [12]), (5, [12]), (10, [])], ids=["none", "older", "all"]
)
def test_a_save_that_was_given_up_is_made_up_for_at_the_next_step(
    cluster: Cluster, tmp_path: Path, committed: int, saved: list[int]
) -> None:
    config = make_config(parallel={"data": 2}, checkpoint={"every": 10}, model={"layers": 2})
    ranks = cluster.run(
        "test_owed_saves:change_ranks",
        2,
        config=msgspec.to_builtins(config),
        root=str(tmp_path),
        committed=committed,
    )
    for rank in ranks:
        assert rank["saved"] == [(step, "") for step in saved]
        assert rank["committed"] == (saved[0] if saved else committed)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == [
        f"step-{step:08d}" for step in saved
    ]
