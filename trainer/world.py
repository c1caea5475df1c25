"""Where this process stands among the workers of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorldInfo:
    """What a launcher tells a worker."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    store_host: str
    store_port: int
    store_is_server: bool
    """Whether this worker must host the rendezvous store itself."""


def local_world(rank: int, world_size: int, port: int = 0) -> WorldInfo:
    """The world of workers that share one machine and a store that somebody else hosts."""
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
