"""The place of a process among the workers of a run.

Pure; registry.py reads it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorldInfo:
    """The description of the world that a launcher gives a worker."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    store_host: str
    store_port: int
    store_is_server: bool
    """Whether this worker hosts the rendezvous store itself, because no agent does."""
    attempt: int = 0
    """How often a launcher has restarted the workers; each attempt has its own rendezvous."""
    job: str = ""
    """The launcher's job if its tasks may be agents; empty under torchrun, which has its own
    agents."""


def local_world(rank: int, world_size: int, port: int = 0) -> WorldInfo:
    """The world of workers on one machine, with a store that another process hosts."""
    return WorldInfo(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        node=0,
        store_host="127.0.0.1",
        store_port=port,
        store_is_server=False,
    )
