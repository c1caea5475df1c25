"""Ranks: two that share one device and exchange sums over gloo, and NCCL with one rank.

NCCL refuses two ranks on one device, and gloo carries host memory, so sums of two ranks of one
device travel by way of the host, whole or packed on the device.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from holdfast.parallel.comm import build_groups
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.optimizer.packing import pack, packed_bytes_bound, unpack_add


def two_ranks(device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of an exchange of sums between two ranks of one device."""
    count, repetitions = (5000, 1) if tiny else (2**25, 5)
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    results = context.SimpleQueue()
    arguments = (str(folder / "store"), device, count, repetitions, results)
    ranks = [context.Process(target=_exchange, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    codes = [rank.exitcode for rank in ranks]
    if codes != [0, 0]:
        raise RuntimeError(f"the ranks ended with exit codes {codes}")
    found = [results.get() for _ in ranks]
    assert found[0].pop("checksum") == found[1].pop("checksum"), "the ranks have other sums"
    return found[0]


def _exchange(
    rank: int, store: str, device: str, count: int, repetitions: int, results: Any
) -> None:
    group = dist.ProcessGroupGloo(dist.FileStore(store, 2), rank, 2)
    generator = torch.Generator().manual_seed(rank)
    mine = torch.randint(-(2**36), 2**36, (count,), generator=generator).to(device)
    room = torch.empty(packed_bytes_bound(count), dtype=torch.uint8, device=device)
    found: dict[str, Any] = {"elements": count}
    for is_packed in (True, False):
        times, total = [], torch.empty_like(mine)
        for _ in range(repetitions + 1):
            group.barrier().wait()
            begin = time.perf_counter()
            sent = room[: pack(mine, room)] if is_packed else mine.view(torch.uint8)
            theirs = _swapped(group, rank, sent.cpu()).to(device)
            if is_packed:
                flags = unpack_add(theirs, mine, total)
            else:
                total.copy_(mine + theirs.view(torch.int64))
                flags = 0
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            assert flags == 0
        name = "packed" if is_packed else "whole"
        found[name] = {"s": statistics.median(times[1:]), "bytes": sent.numel()}
        found.setdefault("checksum", int(total.sum()))
        assert found["checksum"] == int(total.sum()), "packed and whole sums differ"
    results.put(found)


def _swapped(group: Any, rank: int, mine: torch.Tensor) -> torch.Tensor:
    size, other = torch.tensor([mine.numel()]), torch.zeros(1, dtype=torch.int64)
    for sent, received in ((size, other),):
        send, receive = group.send([sent], 1 - rank, 0), group.recv([received], 1 - rank, 0)
        send.wait()
        receive.wait()
    theirs = torch.empty(int(other), dtype=torch.uint8)
    send, receive = group.send([mine], 1 - rank, 1), group.recv([theirs], 1 - rank, 1)
    send.wait()
    receive.wait()
    return theirs


def one_rank(device: str, tiny: bool) -> dict[str, Any]:
    """Creation, time-out and abort of groups whose other rank never comes; gloo's on a CPU."""
    timeout_s = 0.5 if tiny else 8.0
    found: dict[str, Any] = {"timeout_s": timeout_s}
    if device == "cuda":
        found |= _alone()
    for name, aborts_s in (("abort", timeout_s / 4), ("time-out", None)):
        store = dist.HashStore()
        begin = time.perf_counter()
        groups = build_groups(
            store,
            "127.0.0.1",
            0,
            (0, 1),
            {"data": (0, 1)},
            backend="nccl" if device == "cuda" else "gloo",
            generation=0,
            timeout_s=timeout_s if aborts_s is None else 10 * timeout_s,
        )
        created = time.perf_counter() - begin
        if aborts_s is not None:
            threading.Timer(aborts_s, groups.abort, ("the piece ends it",)).start()
        waited = time.perf_counter()
        try:
            groups["data"].all_reduce(torch.ones(4, device=device)).wait()
            if device == "cuda":
                torch.cuda.synchronize()
            groups.signal.check()
            ended = "nothing told of the missing rank"
        except PeerLost as error:
            ended = str(error).splitlines()[0][:160]
        found[name] = {
            "s to create": created,
            "s to end": time.perf_counter() - waited,
            "said": ended,
        }
        groups.abort("the piece is over")
    return found


def _alone() -> dict[str, float]:
    """A group of one rank: the first all-reduce makes the communicator."""
    options = dist.ProcessGroupNCCL.Options()
    begin = time.perf_counter()
    group = dist.ProcessGroupNCCL(dist.HashStore(), 0, 1, options)
    value = torch.ones(2**20, device="cuda")
    group.allreduce([value]).wait()
    torch.cuda.synchronize()
    created = time.perf_counter() - begin
    assert bool((value == 1).all())
    begin = time.perf_counter()
    group.abort()
    return {"s to first all-reduce alone": created, "s to abort alone": time.perf_counter() - begin}
