"""The communicators of one rank in one generation, over torch's process groups or MPI."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never

import torch

from holdfast.parallel.comm.flight_recorder import FlightRecorder, Operation
from holdfast.parallel.comm.gloo import GlooCommunicator, GlooMesh, gloo_device
from holdfast.parallel.comm.nccl import NcclCommunicator, nccl_record
from holdfast.parallel.comm.protocol import AbortSignal, Communicator, MembershipChange

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = [
    "GlooCommunicator",
    "Groups",
    "NcclCommunicator",
    "build_groups",
    "collectives_record",
    "edit_groups",
    "end_transports",
    "gloo_device",
    "separate_group",
]

Backend = Literal["gloo", "nccl", "mpi"]


@dataclass(frozen=True, slots=True)
class Groups:
    """The communicators of one rank in one generation."""

    world: Communicator
    control: Communicator
    """The communicator of all ranks for CPU tensors: votes are CPU tensors on any device."""
    axes: Mapping[str, Communicator]
    """By mesh axis, the communicator of the ranks that differ from this one along it."""
    signal: AbortSignal
    recorder: FlightRecorder
    mesh: GlooMesh | None
    """The gloo connections, which carry the votes; None: everything goes over MPI."""

    def __getitem__(self, axis: str) -> Communicator:
        """The communicator of a mesh axis."""
        return self.axes[axis]

    @property
    def shards(self) -> Communicator:
        """The ranks of this rank's stage replica; a member's index is its shard index.

        If tensor parallelism alone divides a stage replica, it is that axis' communicator.
        """
        return self.axes.get("shards", self.axes["tensor"])

    @property
    def generation(self) -> int:
        return self.signal.generation

    @property
    def is_whole(self) -> bool:
        """Whether the connections of votes are intact and idle. Local."""
        return self.mesh is not None and self.mesh.is_whole

    def extra(self, name: str, ranks: Sequence[int]) -> Communicator:
        """A further gloo communicator of this rank, in this generation.

        Local: an edit leaves it out.

        Args:
            name: a name that no other group of this rank has, the same on all `ranks`.
        """
        assert self.mesh is not None, "MPI alone has no further groups; set votes_over_gloo"
        return GlooCommunicator.over(self.mesh, name, ranks)

    def count(self, name: str, amount: int) -> int:
        """Add to a counter that the generation's ranks share, and read it: one at a time. Local.

        It asks the rendezvous store, and waits for no other rank.

        Args:
            name: the counter, which begins at 0.
        Raises:
            DistError: the store is gone.
            PeerLost: the generation was aborted, also while the store did not answer.
        """
        assert self.mesh is not None, "MPI alone has no counters; set votes_over_gloo"
        return self.mesh.count(name, amount)

    def forget_count(self, name: str) -> None:
        """Remove a counter that no rank needs any more. Local."""
        assert self.mesh is not None
        self.mesh.forget_count(name)

    def abort(self, reason: str) -> None:
        """Abort the generation on this rank; see `Communicator.abort`."""
        self.signal.abort(reason)

    def history(self) -> tuple[Operation, ...]:
        """The newest operations of all groups, in the order of the calls."""
        return self.recorder.history()


def build_groups(
    store: Store,
    host: str,
    rank: int,
    world: Sequence[int],
    axes: Mapping[str, Sequence[int]],
    *,
    backend: Backend,
    generation: int,
    timeout_s: float = 600.0,
    record_path: Path | None = None,
    votes_over_gloo: bool = False,
) -> Groups:
    """Form this rank's communicators. Collective over `world`; a joining rank forms its own.

    Over gloo, ranks connect when they first need each other; nothing is waited for here.

    Args:
        axes: the ranks of this rank's group along each mesh axis, and under "shards" those of its
            stage replica if several axes divide it; the same names on every rank.
        backend: "gloo", "nccl" or "mpi", for everything but votes.
        generation: a part of every connection's name, so that two generations never meet.
        timeout_s: see `GlooCommunicator`; positive and finite.
        record_path: the file in which the rank's operations can be read from outside; see
            parallel/comm/flight_recorder.py.
        votes_over_gloo: use gloo for votes even if everything else goes over MPI, which must be
            whole to carry anything.
    """
    assert timeout_s > 0
    recorder = FlightRecorder(rank, generation=generation, path=record_path)
    signal = AbortSignal(generation)

    def connections() -> GlooMesh:
        device = gloo_device(host)
        return GlooMesh(
            store, rank, device=device, timeout_s=timeout_s, signal=signal, recorder=recorder
        )

    def over_nccl(kind: str, ranks: Sequence[int]) -> Communicator:
        return NcclCommunicator(
            store, kind, ranks, rank, timeout_s=timeout_s, signal=signal, recorder=recorder
        )

    mesh: GlooMesh | None
    match backend:
        case "gloo":
            mesh = connections()
            whole = votes = GlooCommunicator.over(mesh, "world", world)
            along = {axis: GlooCommunicator.over(mesh, axis, axes[axis]) for axis in axes}
        case "nccl":
            mesh = connections()
            whole = over_nccl("world", world)
            votes = GlooCommunicator.over(mesh, "control", world)
            along = {axis: over_nccl(axis, axes[axis]) for axis in axes}
        case "mpi":
            # Imported here because the import starts MPI.
            from holdfast.parallel.comm.mpi import build_mpi_groups

            whole, along = build_mpi_groups(rank, world, axes, signal=signal, recorder=recorder)
            mesh = connections() if votes_over_gloo else None
            votes = whole if mesh is None else GlooCommunicator.over(mesh, "control", world)
        case unknown:
            assert_never(unknown)
    return Groups(whole, votes, along, signal, recorder, mesh)


def end_transports() -> None:
    """End what all ranks must end together: MPI, if it was used. Collective over all ranks."""
    if (mpi := sys.modules.get("holdfast.parallel.comm.mpi")) is not None:
        mpi.end()


def collectives_record() -> Any:
    """torch's own record of NCCL's operations, as it prints it; None if NCCL is not used. Local."""
    return nccl_record() if torch.cuda.is_initialized() else None


def separate_group(
    store: Store, host: str, name: str, ranks: Sequence[int], rank: int, *, timeout_s: float
) -> Communicator:
    """A gloo communicator outside all generations: no membership change ends it. Local.

    Args:
        store: the rendezvous store that all members reach, as `host`'s.
        name: a name that no other group in `store` has, the same on all `ranks`.
        ranks: the members, in any numbering; `rank` is this process.
        timeout_s: the time after which waiters of an operation get `PeerLost`.
    """
    return GlooCommunicator(store, name, ranks, rank, device=gloo_device(host), timeout_s=timeout_s)


def edit_groups(
    groups: Groups,
    change: MembershipChange,
    world: Sequence[int],
    axes: Mapping[str, Sequence[int]],
) -> Groups:
    """The communicators of the generation of `change`; a group that keeps its members is unchanged.

    Every rank that stays calls it, with no operation under way unless the old generation was
    aborted. Ranks that join call `build_groups` with the same generation. Over gloo it is local and
    instant: connections are checked, or made anew, at their next use.

    Args:
        axes: as for `build_groups`, with the same axes.
    Raises:
        PeerLost: the new generation was aborted meanwhile (MPI only, whose edits are collective).
    """
    signal = AbortSignal(change.generation)
    control = groups.control.edit(world, change, signal)
    if groups.world is groups.control:
        whole = control
    else:
        if groups.world.edit_needs_agreement:
            broken = torch.tensor([float(groups.signal.reason is not None)])
            control.all_reduce(broken, "max").wait()
            if broken.item():
                groups.abort("another rank was interrupted")
        whole = groups.world.edit(world, change, signal)
    along = {axis: group.edit(axes[axis], change, signal) for axis, group in groups.axes.items()}
    return Groups(whole, control, along, signal, groups.recorder, groups.mesh)
