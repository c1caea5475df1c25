"""A schedule is added in one place: one `Schedule` in the table, and everything works with it."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest
from torch.distributed import Store

from holdfast.parallel.errors import ConfigError, ScheduleError
from holdfast.parallel.layout import Mesh
from holdfast.parallel.plan import make_plan, replica_timeline, training_program
from holdfast.parallel.schedules import (
    SCHEDULES,
    Action,
    Op,
    Program,
    Schedule,
    check_programs,
    compute_programs,
    placement,
)
from holdfast.trainer.config.loading import check_config
from support.processes.cluster import Cluster
from support.runs.plans import first_plan
from support.runs.small_runs import make_config, run_training, train_steps

NAME = "mirrored"
LAYOUT: dict[str, Any] = {
    "pipeline": 2,
    "virtual": 2,
    "schedule": NAME,
    "blocks_per_chunk": [2, 1, 1, 2],
}


def mirrored(pipeline: int, virtual: int, micro_batches: int) -> tuple[Program, ...]:
    """All forwards, then all backwards, the newest micro-batch first."""

    def program(index: int) -> Program:
        chunks = [c for c, at in enumerate(there_and_back(pipeline, virtual)) if at == index]
        order = [(c, m) for m in range(micro_batches) for c in chunks]
        forwards = [Action(Op.FORWARD, c, m) for c, m in sorted(order)]
        return (*forwards, *(Action(Op.BACKWARD, c, m) for c, m in reversed(sorted(order))))

    return tuple(map(program, range(pipeline)))


def there_and_back(pipeline: int, virtual: int) -> tuple[int, ...]:
    down = tuple(range(pipeline))
    return tuple(at for turn in range(virtual) for at in (down[::-1] if turn % 2 else down))


MIRRORED = Schedule(mirrored, chunks_per_rank=2, placement=there_and_back)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast("dict[str, Schedule]", SCHEDULES), NAME, MIRRORED)


def train_registered(
    rank: int, world_size: int, store: Store, *, config: dict[str, Any]
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        return train_steps(rank, world_size, store, config=config)


def test_a_registered_schedule_is_planned_checked_and_simulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch)
    assert placement(NAME, 2, 2) == (0, 1, 1, 0)
    plan = make_plan(
        first_plan().layers,
        Mesh.of(tensor=1, data=1, pipeline=2),
        virtual=2,
        schedule=NAME,
        micro_batches=3,
        block_elements=64,
    )
    check_programs({r: training_program(plan, r) for r in (0, 1)}, chunks=4, micro_batches=range(3))
    assert replica_timeline(plan).makespan > 0
    check_config(make_config(parallel=LAYOUT))


def test_the_table_says_how_many_chunks_a_schedule_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    with pytest.raises(ScheduleError, match=r"set parallel\.virtual = 2$"):
        compute_programs(NAME, 2, 1, 3)


def test_an_unregistered_name_is_refused_with_the_nearest() -> None:
    for ask in (lambda: placement("zbv", 2, 2), lambda: compute_programs("zbv", 2, 2, 3)):
        with pytest.raises(
            ScheduleError, match=r"'zbv': allowed are 'gpipe', .*did you mean 'zb-v'"
        ):
            ask()
    with pytest.raises(ConfigError, match=r"parallel\.schedule = 'zbv'.*did you mean 'zb-v'"):
        check_config(make_config(parallel={"schedule": "zbv"}))


@pytest.mark.mp
def test_a_registered_schedule_trains_to_the_same_bits(cluster: Cluster) -> None:
    train = {"steps": 3}
    config = make_config(parallel=LAYOUT, train=train)
    results = cluster.run(
        "test_new_schedule:train_registered", 2, timeout_s=90.0, config=msgspec.to_builtins(config)
    )
    assert results[0] == results[1]
    assert results[0] == run_training(cluster, make_config(train=train))
