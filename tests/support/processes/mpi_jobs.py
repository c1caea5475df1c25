"""What ranks do under mpirun in test_comm_mpi.py: `python mpi_jobs.py JOB FOLDER`; results as
JSON by rank.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.parallel.comm.groups import Groups, build_groups, edit_groups
from holdfast.parallel.comm.protocol import AbortSignal, MembershipChange
from holdfast.parallel.errors import ConfigError, PeerLost


def axes_of(rank: int, ranks: Sequence[int]) -> dict[str, list[int]]:
    """Tensor groups of neighbours, pipelines of even and of odd ranks."""
    return {
        "tensor": [r for r in ranks if r // 2 == rank // 2],
        "pipeline": [r for r in ranks if r % 2 == rank % 2],
    }


def groups_of(rank: int, world_size: int) -> Groups:
    """Tensor groups of neighbours, pipelines of even and of odd ranks."""
    ranks = range(world_size)
    return build_groups(
        torch.distributed.HashStore(),
        "127.0.0.1",
        rank,
        ranks,
        axes_of(rank, ranks),
        backend="mpi",
        generation=0,
    )


def check_sums(groups: Groups, rank: int) -> None:
    for group in (groups.world, groups.control, groups["tensor"], groups["pipeline"]):
        value = torch.tensor([float(2**rank)], dtype=torch.float64)
        group.all_reduce(value).wait()
        assert value.item() == sum(2**r for r in group.ranks), group.ranks
        group.barrier()


def collectives(rank: int, world_size: int) -> dict[str, Any]:
    comm = groups_of(rank, world_size).world

    def values(elements: int) -> torch.Tensor:
        return torch.randn(elements, generator=torch.Generator().manual_seed(100 * rank + 7))

    results = {}
    for elements in (5, 100_003):
        summed, largest = values(elements), values(elements)
        comm.all_reduce(summed).wait()
        comm.all_reduce(largest, "max").wait()
        results[f"summed {elements}"] = summed[-3:].tolist()
        results[f"largest {elements}"] = largest[-3:].tolist()
    gathered = [torch.empty(m + 1) for m in range(world_size)]
    comm.all_gather(gathered, values(rank + 1)).wait()
    scattered = torch.empty(rank + 2)
    comm.reduce_scatter(
        scattered,
        list(values(sum(range(2, world_size + 2))).split([m + 2 for m in range(world_size)])),
    ).wait()
    peer = rank ^ 1
    integers = torch.arange(3, dtype=torch.int64) + rank
    received = [torch.empty(3, dtype=torch.int64) for _ in range(2)]
    sends = [comm.send(integers * tag, peer, tag) for tag in (3, 1)]
    for handle in (comm.receive(received[0], peer, 1), comm.receive(received[1], peer, 3), *sends):
        handle.wait()
    comm.barrier()
    results["gathered"] = [part.tolist() for part in gathered]
    results["scattered"] = scattered.tolist()
    results["received"] = [part.tolist() for part in received]
    results["history"] = sorted({o.operation for o in comm.history() if o.outcome == "done"})
    return results


def beginning(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 1 starts MPI after it has heard from another thread of rank 0, which starts it first."""
    heard, starts = folder / "heard", threading.Event()

    def speak() -> None:
        starts.wait()
        time.sleep(0.3)
        heard.touch()

    if rank == 0:
        threading.Thread(target=speak, daemon=True).start()
    deadline = time.monotonic() + 15
    while rank and not heard.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    was_heard = heard.exists()
    starts.set()
    importlib.import_module("holdfast.parallel.comm.mpi")
    return {"heard": was_heard}


def losses(rank: int, world_size: int) -> dict[str, Any] | None:
    """Ranks 2 and then 0 are killed; each time the others abort, shrink and go on."""
    groups = groups_of(rank, world_size)
    check_sums(groups, rank)
    alive = tuple(range(world_size))
    told, same = [], []
    for generation, victim in enumerate((2, 0), 1):
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        told.append(_wait_in_vain(groups, victim, alive, rank))
        alive = tuple(r for r in alive if r != victim)
        edited = edit_groups(
            groups,
            MembershipChange(generation, left=frozenset({victim})),
            alive,
            axes_of(rank, alive),
        )
        same.append(
            [edited["tensor"] is groups["tensor"], edited["pipeline"] is groups["pipeline"]]
        )
        groups = edited
        check_sums(groups, rank)
    try:
        groups.world.edit(alive, MembershipChange(3, joined=frozenset({0})), AbortSignal(3))
        told.append("joined")
    except ConfigError as error:
        told.append(str(error))
    return {"told": told, "same": same, "ranks": groups.world.ranks}


def _wait_in_vain(groups: Groups, victim: int, alive: tuple[int, ...], rank: int) -> str:
    """Wait for the victim or for a live rank that sends nothing; abort, as an agent would."""
    living = next(r for r in alive if r not in (rank, victim))
    peer = victim if rank % 2 else living
    timer = threading.Timer(0.3, groups.abort, (f"rank {victim} is gone",))
    timer.start()
    try:
        groups.world.receive(torch.empty(4), peer, 11).wait()
        return "returned"
    except PeerLost as error:
        return str(error)
    finally:
        timer.join()


def main() -> None:
    job, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    if job == "beginning":
        result = beginning(rank, folder)
    else:
        result = globals()[job](rank, int(os.environ["OMPI_COMM_WORLD_SIZE"]))
    partial = folder / f"{rank}.partial"
    partial.write_text(json.dumps(result))
    partial.replace(folder / f"{rank}.json")
    if job == "losses":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # MPI_Finalize may wait for the dead; see parallel/comm/mpi.py
    importlib.import_module("mpi4py.MPI").Finalize()  # forked processes end without
    gc.freeze()  # a last collection of what torch has made takes half a second


if __name__ == "__main__":
    main()
