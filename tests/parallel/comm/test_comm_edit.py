"""Ranks leave and join: groups without them stay, the others go on with new members."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from holdfast.parallel.comm import p2p_collectives as comm_pairwise
from holdfast.parallel.comm.gloo import GlooCommunicator, gloo_device
from holdfast.parallel.comm.groups import Groups, build_groups, edit_groups
from holdfast.parallel.comm.protocol import MembershipChange
from support.processes.cluster import Cluster

RANKS = 6
WORLD = tuple(range(RANKS))


def _tensor(rank: int, world: Sequence[int]) -> tuple[int, ...]:
    """Pairs (0, 1), (2, 3), (4, 5)."""
    return tuple(r for r in world if r // 2 == rank // 2)


def _pipeline(rank: int, world: Sequence[int]) -> tuple[int, ...]:
    """Even and odd ranks."""
    return tuple(r for r in world if r % 2 == rank % 2)


def _axes(rank: int, world: Sequence[int]) -> dict[str, tuple[int, ...]]:
    return {"tensor": _tensor(rank, world), "pipeline": _pipeline(rank, world)}


def _build(rank: int, world: Sequence[int], store: Any, generation: int = 0) -> Groups:
    return build_groups(
        store,
        "127.0.0.1",
        rank,
        world,
        _axes(rank, world),
        backend="gloo",
        generation=generation,
        timeout_s=30.0,
    )


def _edit(groups: Groups, rank: int, world: Sequence[int], change: MembershipChange) -> Groups:
    return edit_groups(groups, change, world, _axes(rank, world))


def _check_sums(groups: Groups, rank: int) -> None:
    for group in (groups.world, groups.control, groups["tensor"], groups["pipeline"]):
        value = torch.tensor([float(2**rank)])
        group.all_reduce(value).wait()
        assert value.item() == sum(2**r for r in group.ranks), group.ranks


def _connections(groups: Groups) -> dict[Any, int]:
    assert groups.mesh is not None
    return {key: id(connection._group) for key, connection in groups.mesh._connections.items()}


def one_leaves(rank: int, world_size: int, store: Any) -> dict[str, Any] | None:
    """Rank 3 leaves at a step's end."""
    before = _build(rank, WORLD, store)
    _check_sums(before, rank)
    connections = _connections(before)
    store.set(f"summed/{rank}", "1")
    store.wait([f"summed/{r}" for r in WORLD])
    if rank == 3:
        before.abort("this rank leaves")
        return None
    rest = (0, 1, 2, 4, 5)
    after = _edit(before, rank, rest, MembershipChange(1, left=frozenset({3})))
    _check_sums(after, rank)
    return {
        "same": [
            after.world is before.world,
            after.control is before.control,
            *(after[axis] is before[axis] for axis in ("tensor", "pipeline")),
        ],
        "generation": after.generation,
        "kept": {
            key[1] for key, number in _connections(after).items() if connections[key] == number
        },
        "new": {key for key, number in _connections(after).items() if connections[key] != number},
    }


@pytest.mark.mp
def test_groups_without_the_lost_rank_stay_and_so_do_connections_of_the_others(
    cluster: Cluster,
) -> None:
    results = cluster.run("test_comm_edit:one_leaves", RANKS, timeout_s=60)
    for rank in (0, 1, 2, 4, 5):
        result = results[rank]
        assert result["same"] == [False, False, rank != 2, rank % 2 == 0]
        assert result["generation"] == 1
        assert result["kept"] == {0, 1, 2, 4, 5} - {rank}
        assert result["new"] == set()


def _held() -> tuple[int, int]:
    """Descriptors and threads of this process, once what ends in the background has ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("holdfast-comm"):
            thread.join()
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def leave_and_join(
    rank: int, world_size: int, store: Any, *, rounds: int, kept: bool
) -> tuple[int, ...]:
    """Rank `g % 6` is out in generation g; the one that was out before has come back."""
    groups = _build(rank, WORLD, store) if rank else None
    out = 0
    world = tuple(r for r in WORLD if r != out)
    if groups is not None:
        groups = _edit(groups, rank, world, MembershipChange(1, left=frozenset({0}), kept=kept))
        _check_sums(groups, rank)
    for generation in range(2, rounds + 2):
        leaves = generation % RANKS
        change = MembershipChange(
            generation, left=frozenset({leaves}), joined=frozenset({out}) - {leaves}, kept=kept
        )
        world = tuple(r for r in WORLD if r != leaves)
        if rank == leaves:
            groups = None
        elif groups is None:
            groups = _build(rank, world, store, generation)
        else:
            groups = _edit(groups, rank, world, change)
        out = leaves
        if groups is not None:
            _check_sums(groups, rank)
    store.set(f"done/{rank}", "1")
    store.wait([f"done/{r}" for r in WORLD])
    return store.num_keys(), *_held()


@pytest.mark.mp
@pytest.mark.parametrize("kept", [False, True], ids=["peers are asked", "known to stand"])
def test_ranks_come_and_go_without_leaving_anything_behind(cluster: Cluster, kept: bool) -> None:
    job = "test_comm_edit:leave_and_join"
    few = cluster.run(job, RANKS, timeout_s=60, rounds=RANKS, kept=kept)
    many = cluster.run(job, RANKS, timeout_s=60, rounds=5 * RANKS, kept=kept)
    for (keys, descriptors, threads), (more_keys, more_descriptors, more_threads) in zip(
        few, many, strict=True
    ):
        assert more_keys == keys + RANKS, "the six of the second job that say it is done"
        assert more_descriptors <= descriptors
        assert more_threads <= threads


def _vote_in_vain(groups: Groups) -> None:
    """Rank 0 does not come; the call fails at once if another rank has aborted before."""
    vote = groups.control.all_reduce(torch.ones(1))
    groups.abort("rank 4 is gone")
    vote.wait()


def lost_while_editing(rank: int, world_size: int, store: Any) -> float | None:
    """Rank 5 is killed; while the rest edits, rank 4 is killed too."""
    groups = _build(rank, WORLD, store)
    _check_sums(groups, rank)
    store.set(f"summed/{rank}", "1")
    store.wait([f"summed/{r}" for r in WORLD])
    if rank == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    groups.abort("rank 5 is gone")
    groups = _edit(groups, rank, range(5), MembershipChange(1, left=frozenset({5})))
    if rank == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank:
        with pytest.raises(ConnectionError):
            _vote_in_vain(groups)
        groups.abort("rank 4 is gone")
    groups = _edit(groups, rank, range(4), MembershipChange(2, left=frozenset({4})))
    _check_sums(groups, rank)
    total = torch.tensor([1.0])
    groups.control.all_reduce(total).wait()
    return total.item()


@pytest.mark.mp
@pytest.mark.chaos
def test_a_rank_lost_while_editing_starts_another_edit(cluster: Cluster) -> None:
    job = "test_comm_edit:lost_while_editing"
    assert cluster.run(job, RANKS, timeout_s=60, dying=(4, 5))[:4] == [4.0] * 4


def float_sums(
    rank: int, world_size: int, store: Any, *, elements: int, direct: int
) -> list[float]:
    before, comm_pairwise.DIRECT_MEMBERS = comm_pairwise.DIRECT_MEMBERS, direct
    try:
        device = gloo_device("127.0.0.1")
        comm = GlooCommunicator(
            store, "world", range(world_size), rank, device=device, timeout_s=30.0
        )
        value = _part(rank, elements)
        comm.all_reduce(value).wait()
        largest = _part(rank, elements)
        comm.all_reduce(largest, "max").wait()
        comm.barrier()
        return [*value[:3].tolist(), *value[-3:].tolist(), *largest[-3:].tolist()]
    finally:
        comm_pairwise.DIRECT_MEMBERS = before


def _part(rank: int, elements: int) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(rank))


@pytest.mark.mp
@pytest.mark.parametrize(
    ("world_size", "elements", "direct"),
    [(3, 100, 16), (3, 100, 2), (5, 17, 2), (8, 100, 2), (7, 17, 2), (3, 100_003, 16)],
)
def test_float_sums_are_taken_in_member_order_by_every_algorithm(
    cluster: Cluster, world_size: int, elements: int, direct: int
) -> None:
    parts = [_part(rank, elements) for rank in range(world_size)]
    expected, largest = parts[0].clone(), torch.stack(parts).amax(0)
    for part in parts[1:]:
        expected += part
    want = [*expected[:3].tolist(), *expected[-3:].tolist(), *largest[-3:].tolist()]
    job = "test_comm_edit:float_sums"
    assert cluster.run(job, world_size, elements=elements, direct=direct) == [want] * world_size
