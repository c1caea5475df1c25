"""The workers of a run, as they introduce themselves at its rendezvous store."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from torch.distributed import Store

from holdfast.trainer.worlds import WorldInfo


def introduce(store: Store, world: WorldInfo) -> None:
    """Publish this worker's description in the store."""
    worker = {"rank": world.rank, "pid": os.getpid(), "node": socket.gethostname()}
    store.set(f"worker/{world.rank}", json.dumps(worker))


def workers_of(store: Store, world: WorldInfo) -> list[dict[str, Any]]:
    """The descriptions of all workers, by rank, once they are all there."""
    keys = [f"worker/{rank}" for rank in range(world.world_size)]
    store.wait(keys)
    return [json.loads(text) for text in store.multi_get(keys)]


def nodes_of(workers: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """The node of each rank: equal numbers for workers on one machine."""
    names = list(dict.fromkeys(worker["node"] for worker in workers))
    return tuple(names.index(worker["node"]) for worker in workers)
