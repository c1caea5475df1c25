"""The groups that one rank belongs to in one generation, over torch's process groups or MPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from holdfast.parallel.comm.flight_recorder import FlightRecorder, Operation
from holdfast.parallel.comm.gloo import GlooCommunicator, GlooMesh, gloo_device
from holdfast.parallel.comm.nccl import NcclCommunicator
from holdfast.parallel.comm.protocol import AbortSignal, Communicator, MembershipChange

if TYPE_CHECKING:
    from torch.distributed import Store

    from holdfast.parallel.comm.mpi import MpiCommunicator

__all__ = [
    "GlooCommunicator",
    "Groups",
    "NcclCommunicator",
    "build_groups",
    "edit_groups",
    "gloo_device",
]

Backend = Literal["gloo", "nccl", "mpi"]


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups one rank belongs to in one generation."""

    world: Communicator
    control: Communicator
    """All ranks, for CPU tensors: votes are CPU tensors whatever the device."""
    axes: Mapping[str, Communicator]
    """By name of a mesh axis, the ranks that differ from this one along it."""
    signal: AbortSignal
    recorder: FlightRecorder

    def __getitem__(self, axis: str) -> Communicator:
        """The communicator of a mesh axis."""
        return self.axes[axis]

    @property
    def shards(self) -> Communicator:
        """The ranks of this rank's stage replica; a member's index is its shard index.

        Where tensor parallelism is all that divides a stage replica, it is that axis' communicator.
        """
        return self.axes.get("shards", self.axes["tensor"])

    @property
    def generation(self) -> int:
        return self.signal.generation

    def abort(self, reason: str) -> None:
        """End the generation on this rank: see `Communicator.abort`."""
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
    backend: str,
    generation: int,
    timeout_s: float = 600.0,
    record_path: Path | None = None,
    votes_over_gloo: bool = False,
) -> Groups:
    """Form this rank's groups. Collective over `world`; a rank that joins forms its own.

    Over gloo ranks connect when they first need each other; nothing is waited for here.

    Args:
        axes: the ranks of this rank's group along each mesh axis, and under "shards" those of its
            stage replica where several axes divide it; the same names on every rank.
        backend: "gloo", "nccl" or "mpi", for everything but votes.
        generation: part of every connection's name, so that those of two generations never meet.
        timeout_s: see `GlooCommunicator`; positive and finite.
        votes_over_gloo: also where all else goes over MPI, which must be whole to carry anything.
        record_path: file in which the rank's operations can be read from outside; see
            parallel/comm/flight_recorder.py.
    """
    assert timeout_s > 0
    recorder = FlightRecorder(rank, generation=generation, path=record_path)
    signal = AbortSignal(generation)

    def meshed() -> GlooMesh:
        device = gloo_device(host)
        return GlooMesh(
            store, rank, device=device, timeout_s=timeout_s, signal=signal, recorder=recorder
        )

    if backend == "mpi":
        # Imported here: to import MPI is to start it.
        from holdfast.parallel.comm.mpi import build_mpi_groups

        everybody, along = build_mpi_groups(rank, world, axes, signal=signal, recorder=recorder)
        votes = GlooCommunicator.over(meshed(), "control", world) if votes_over_gloo else everybody
        return Groups(everybody, votes, along, signal, recorder)
    mesh = meshed()
    control = GlooCommunicator.over(mesh, "world" if backend == "gloo" else "control", world)

    def group(kind: str, ranks: Sequence[int]) -> Communicator:
        if backend == "gloo":
            return GlooCommunicator.over(mesh, kind, ranks)
        return NcclCommunicator(
            store, kind, ranks, rank, timeout_s=timeout_s, signal=signal, recorder=recorder
        )

    return Groups(
        world=control if backend == "gloo" else group("world", world),
        control=control,
        axes={axis: group(axis, ranks) for axis, ranks in axes.items()},
        signal=signal,
        recorder=recorder,
    )


def edit_groups(
    groups: Groups,
    change: MembershipChange,
    world: Sequence[int],
    axes: Mapping[str, Sequence[int]],
    *,
    store: Store | None = None,
) -> Groups:
    """The groups of the generation of `change`; those whose members all stay are the same objects.

    Every rank that stays calls it, with nothing under way unless the old generation was aborted;
    ranks that join call `build_groups` with the same generation. Over gloo it is local and instant;
    connections are checked, or made anew, when they are next used.

    Args:
        axes: as for `build_groups`, with the same axes.
        store: where the new generation's ranks find each other; None: the old generation's.
    Raises:
        PeerLost: the new generation was aborted meanwhile (MPI, where editing is collective).
    """
    over_gloo = isinstance(groups.control, GlooCommunicator)
    if isinstance(groups.control, GlooCommunicator):
        groups.control.mesh.edit(change, store)
    control = groups.control.edit(world, change)
    signal = control.signal
    if over_gloo and not isinstance(groups.world, (GlooCommunicator, NcclCommunicator)):
        # To edit MPI's groups all must know alike whether they are broken.
        broken = torch.tensor([float(groups.signal.reason is not None)])
        control.all_reduce(broken, "max").wait()
        if broken.item():
            groups.abort("another rank was interrupted")

    def edited(group: Communicator, ranks: Sequence[int]) -> Communicator:
        if over_gloo and not isinstance(group, GlooCommunicator):
            return cast("MpiCommunicator | NcclCommunicator", group).edit_with(
                ranks, change, signal
            )
        return group.edit(ranks, change)

    return Groups(
        world=control if groups.world is groups.control else edited(groups.world, world),
        control=control,
        axes={axis: edited(group, axes[axis]) for axis, group in groups.axes.items()},
        signal=signal,
        recorder=groups.recorder,
    )
