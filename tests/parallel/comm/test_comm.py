"""Communicators over real processes: what arrives is what numpy computes from what was sent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.parallel.comm.groups import GlooCommunicator, gloo_device
from holdfast.parallel.comm.timings.messages import NeighbourTimes, clock_offsets
from holdfast.parallel.comm.timings.window import compare_clocks
from holdfast.parallel.errors import PeerLost
from support.processes.cluster import Cluster, WorkerFailed


def _group(rank: int, world_size: int, store: Any, timeout_s: float = 30.0) -> GlooCommunicator:
    device = gloo_device("127.0.0.1")
    return GlooCommunicator(
        store, "world", range(world_size), rank, device=device, timeout_s=timeout_s
    )


def _values(rank: int, elements: int) -> torch.Tensor:
    return torch.arange(elements, dtype=torch.float32) * (rank + 1)


def collectives(rank: int, world_size: int, store: Any) -> dict[str, Any]:
    comm = _group(rank, world_size, store)
    summed = _values(rank, 5)
    comm.all_reduce(summed).wait()
    largest = _values(rank, 5)
    comm.all_reduce(largest, "max").wait()
    gathered = [torch.empty(m + 1) for m in range(world_size)]
    comm.all_gather(gathered, _values(rank, rank + 1)).wait()
    scattered = torch.empty(rank + 2)
    comm.reduce_scatter(scattered, [_values(rank, m + 2) for m in range(world_size)]).wait()
    exchanged = [torch.empty(1) for _ in range(world_size)]
    comm.all_to_all(exchanged, [torch.tensor([10.0 * rank + m]) for m in range(world_size)]).wait()
    comm.barrier()
    return {
        "summed": summed.tolist(),
        "largest": largest.tolist(),
        "gathered": [part.tolist() for part in gathered],
        "scattered": scattered.tolist(),
        "exchanged": [part.item() for part in exchanged],
    }


@pytest.mark.mp
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_collectives_give_what_they_promise(cluster: Cluster, world_size: int) -> None:
    total = sum(range(1, world_size + 1))
    for rank, result in enumerate(cluster.run("test_comm:collectives", world_size)):
        assert result["summed"] == [i * total for i in range(5)]
        assert result["largest"] == [float(i * world_size) for i in range(5)]
        assert result["gathered"] == [
            [i * (m + 1.0) for i in range(m + 1)] for m in range(world_size)
        ]
        assert result["scattered"] == [float(i * total) for i in range(rank + 2)]
        assert result["exchanged"] == [10.0 * m + rank for m in range(world_size)]


def tagged_messages(rank: int, world_size: int, store: Any) -> list[float]:
    comm = _group(rank, world_size, store)
    peer = 1 - rank
    sends = [comm.send(torch.tensor([float(tag)]), peer, tag) for tag in (3, 1, 2)]
    received = [torch.empty(1) for _ in range(3)]
    handles = [comm.receive(received[tag - 1], peer, tag) for tag in (1, 2, 3)]
    for handle in (*handles, *sends):
        handle.wait()
    return [value.item() for value in received]


@pytest.mark.mp
def test_messages_are_matched_by_tag_not_by_order(cluster: Cluster) -> None:
    assert cluster.run("test_comm:tagged_messages", 2) == [[1.0, 2.0, 3.0]] * 2


def wait_for_silent_peer(rank: int, world_size: int, store: Any) -> str:
    comm = _group(rank, world_size, store, timeout_s=1.0)
    if rank == 1:
        store.wait(["given up"])
        return ""
    try:
        comm.receive(torch.empty(1), 1, 5).wait()
    except PeerLost as error:
        return str(error)
    finally:
        store.set("given up", "1")
    return "arrived"


@pytest.mark.mp
def test_a_silent_peer_is_named(cluster: Cluster) -> None:
    message = cluster.run("test_comm:wait_for_silent_peer", 2)[0]
    assert "receive with rank 1 in group world" in message


def exchange_with_silent_member(
    rank: int, world_size: int, store: Any
) -> tuple[str, list[str], set[tuple[str, int]]]:
    comm = _group(rank, world_size, store, timeout_s=3.0)  # none of the others is so late
    inputs = [torch.ones(2) for _ in range(world_size)]
    comm.all_to_all([torch.empty(2) for _ in range(world_size)], inputs).wait()
    before, told = len(comm.history()), ""
    if rank != 2:
        try:
            comm.all_to_all([torch.empty(2) for _ in range(world_size)], inputs).wait()
        except PeerLost as error:
            told = str(error)
    idle = {(c.name, c.peer) for c in comm.mesh._connections.values() if c.is_idle}
    store.set(f"given up {rank}", "1")
    store.wait([f"given up {other}" for other in range(world_size)])
    new = comm.history()[before:]
    return told, [o.outcome for o in new if o.peer != 2], idle


@pytest.mark.mp
def test_the_silent_member_of_an_exchange_is_named(cluster: Cluster) -> None:
    """Messages of the others before its own are done: they are waited for in turn."""
    results = cluster.run("test_comm:exchange_with_silent_member", 4)
    for rank, (told, outcomes, _) in enumerate(results):
        if rank != 2:
            assert "all_to_all with rank 2 in group world" in told, (rank, told)
            assert "failed" not in outcomes, (rank, outcomes)
    # Rank 0 has waited for a message from 3 and for one to 1: their connections can be kept.
    assert results[0][2] >= {("world<", 3), ("world>", 1)}


def classes_of_threads(rank: int, world_size: int, store: Any) -> tuple[int, set[int]]:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # tests have another
    comm = _group(rank, world_size, store)
    comm.barrier()
    of_gloo = {
        os.sched_getscheduler(int(task.name))
        for task in Path("/proc/self/task").iterdir()
        if (task / "comm").read_text().startswith("gloo")
    }
    return os.sched_getscheduler(0), of_gloo


@pytest.mark.mp
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the classes of threads are Linux's")
def test_threads_of_gloo_take_no_core_from_those_that_compute(cluster: Cluster) -> None:
    classes = cluster.run("test_comm:classes_of_threads", 2)
    assert classes == [(os.SCHED_OTHER, {os.SCHED_BATCH})] * 2


def failing(rank: int, world_size: int, store: Any) -> None:
    if rank == 1:
        raise ValueError("on purpose")


@pytest.mark.mp
def test_a_failing_rank_fails_the_test(cluster: Cluster) -> None:
    with pytest.raises(WorkerFailed, match="on purpose"):
        cluster.run("test_comm:failing", 2)


def clocks(rank: int, world_size: int, store: Any) -> tuple[float, float]:
    comm = _group(rank, world_size, store)
    near = compare_clocks(comm)
    comm.barrier()
    return near.from_before_s, near.from_after_s


@pytest.mark.mp
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_one_clock_find_no_difference_beyond_what_a_message_takes(
    cluster: Cluster, world_size: int
) -> None:
    times = cluster.run("test_comm:clocks", world_size)
    longest_s = max(max(each) for each in times)
    assert min(min(each) for each in times) > 0
    ring = [NeighbourTimes(rank, *each) for rank, each in enumerate(times)]
    assert max(map(abs, clock_offsets(ring))) <= world_size * longest_s / 2
