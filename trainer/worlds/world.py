"""The place of a process among the workers of a run.

Pure; registry.py reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from holdfast.parallel.links import derived_key


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
    secret: str = field(default="", repr=False)
    """The secret of the processes of a run; empty: its store is open to all that reach it."""

    def with_own_store(self) -> WorldInfo:
        """The same world, whose only worker asks no other process for a store."""
        return replace(self, store_host="127.0.0.1", store_port=0, store_is_server=True)

    @property
    def store_key(self) -> bytes:
        """The key to the door of the run's store."""
        return derived_key(self.secret, f"store of {self.job} {self.attempt}")

    @property
    def meeting_key(self) -> bytes:
        """The key by which the tasks of a job know each other, before they have a run."""
        return derived_key(self.secret, f"tasks of {self.job} {self.attempt}")


def local_world(rank: int, world_size: int, port: int = 0, secret: str = "") -> WorldInfo:
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
        secret=secret,
    )
