"""State sent beside steps that change it: a block that has arrived follows every later step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.parallel.comm.gloo import GlooCommunicator, gloo_device
from holdfast.parallel.optimizer.background_transfer import BackgroundTransfer, in_turn
from holdfast.parallel.optimizer.rules.adamw import ADAMW
from holdfast.parallel.optimizer.rules.rule import StateFormat
from holdfast.parallel.plan.block_transfers import BlockKey, BlockTransfer
from holdfast.parallel.precision import PRECISIONS
from support.processes.cluster import Cluster

SOURCES, TARGETS = (0, 1), (2, 3)
TRANSFERS, SIZE = 5, 300
STEPS = 20
FORM = StateFormat(ADAMW, PRECISIONS["fp32"])


def block_transfers() -> list[BlockTransfer]:
    """Each source gives each target blocks of its own, two to a transfer."""
    found = []
    for source in SOURCES:
        for target in TARGETS:
            first = 100 * source + 10 * target
            for number in range(TRANSFERS):
                keys = ((source, first + 2 * number), (source, first + 2 * number + 1))
                found.append(BlockTransfer(source, target, keys, (SIZE, SIZE + 1)))
    return found


def first_state(key: BlockKey, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * key[0] + key[1])
    return {kind: torch.randn(size, generator=generator) for kind in FORM.held}


@dataclass
class StepPace:
    """Ends where it is told to, or when all has arrived."""

    required: int | None
    step: int = 0

    def must_end(self) -> bool | None:
        return None if self.required is None else self.step == self.required

    def may_end(self) -> bool:
        return True


def transfer_beside_steps(
    rank: int, world_size: int, store: Any, *, pause_s: Mapping[int, float], required: int | None
) -> tuple[int, bool]:
    """The number of votes until all blocks had arrived, and whether their state is equal."""
    device = gloo_device("127.0.0.1")
    world = range(world_size)
    comm = GlooCommunicator(store, "steps", world, rank, device=device, timeout_s=30.0)
    beside = GlooCommunicator.over(comm.mesh, "beside", world)
    sizes = {k: s for p in block_transfers() for k, s in zip(p.keys, p.sizes, strict=True)}
    mine = {k for p in block_transfers() if rank in (p.source, p.target) for k in p.keys}
    true = {key: first_state(key, sizes[key]) for key in mine}
    state = {
        key: {kind: v.clone() if rank in SOURCES else torch.zeros_like(v) for kind, v in s.items()}
        for key, s in true.items()
    }

    def write(key: BlockKey, found: Mapping[str, Tensor]) -> None:
        for kind in FORM.held:
            state[key][kind].copy_(found[kind])

    transfer = BackgroundTransfer(
        block_transfers(),
        rank,
        beside,
        state.__getitem__,
        write,
        form=FORM,
        recorder=comm.mesh.recorder,
        pace=(pace := StepPace(required)),
    )
    needed = 0
    for step in range(1, STEPS + 1):
        pace.step = step
        transfer.start()
        time.sleep(pause_s.get(rank, 0.0))
        unfinished = torch.tensor([float(not transfer.pause())])
        comm.all_reduce(unfinished).wait()
        needed += 1
        for values in (*state.values(), *true.values()):
            for kind in FORM.held:
                values[kind].mul_(1.0 + 0.01 * step)
        if not unfinished.item():
            break
    return needed, all(
        torch.equal(state[k][kind], true[k][kind]) for k in mine for kind in FORM.held
    )


@pytest.mark.mp
@pytest.mark.parametrize("pause_s", [{}, {0: 0.01, 3: 0.02}, {1: 0.05, 2: 0.05}])
def test_blocks_follow_their_source_from_whatever_step_they_come_in(
    cluster: Cluster, pause_s: dict[int, float]
) -> None:
    results = cluster.run(
        "test_background_transfer:transfer_beside_steps", 4, pause_s=pause_s, required=None
    )
    assert all(equal for _, equal in results)
    assert len({needed for needed, _ in results}) == 1
    assert (
        1 <= results[0][0] <= TRANSFERS
    )  # one transfer of every pair at least comes in every step


@pytest.mark.mp
@pytest.mark.parametrize("required", [1, 4])
def test_a_run_that_is_repeated_is_told_when_all_is_there(cluster: Cluster, required: int) -> None:
    results = cluster.run(
        "test_background_transfer:transfer_beside_steps", 4, pause_s={}, required=required
    )
    assert results == [(required, True)] * 4


def test_nobody_waits_while_one_target_gets_all() -> None:
    order = in_turn(block_transfers())
    pairs = [(p.source, p.target) for p in order]
    assert pairs == pairs[:4] * TRANSFERS
    assert sorted(order, key=str) == sorted(block_transfers(), key=str)
