"""The workers of a run, as they introduce themselves at its rendezvous store."""

from __future__ import annotations

import json
import os
import socket
from typing import TypedDict

from torch.distributed import Store

from holdfast.parallel.errors import MembershipError
from holdfast.parallel.files import machine_identity
from holdfast.parallel.reading import Count, Text, decode_json
from holdfast.trainer.worlds import WorldInfo


class Worker(TypedDict):
    """The description of a worker."""

    rank: Count
    pid: Count
    node: Text
    """The host's name."""
    machine: Text
    """The machine's identity, which tells hosts of one name apart."""


def introduce(store: Store, world: WorldInfo) -> None:
    """Publish this worker's description in the store."""
    worker = Worker(
        rank=world.rank, pid=os.getpid(), node=socket.gethostname(), machine=machine_identity()
    )
    store.set(f"worker/{world.rank}", json.dumps(worker))


def workers_of(store: Store, world: WorldInfo) -> list[Worker]:
    """The descriptions of all workers, by rank, once they are all there.

    Raises:
        MembershipError: one is not as a worker of this version writes it.
    """
    keys = [f"worker/{rank}" for rank in range(world.world_size)]
    store.wait(keys)
    try:
        return [decode_json(text, Worker) for text in store.multi_get(keys)]
    except ValueError as error:
        raise MembershipError(f"a worker introduces itself in a strange way: {error}") from error
