"""Communicators over MPI (mpi4py), with Open MPI's fault tolerance (ULFM) for aborts and edits.

Messages and sums are those of p2p_collectives.py, so training gives the same bits as over gloo.
Waits test their request and the generation in turn, so an abort ends them even if the library would
go on waiting. An abort also revokes the communicators with messages under way, which frees the
peers. MPI moves large messages only during its calls; later waits complete a send.

Start workers with `mpirun --with-ft ulfm`. Without it everything works but `edit`.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import mpi4py

mpi4py.rc.initialize = False  # see _begin

from mpi4py import MPI  # noqa: E402
from torch import Tensor  # noqa: E402

from holdfast.parallel.comm.flight_recorder import FlightRecorder  # noqa: E402
from holdfast.parallel.comm.p2p_collectives import PairwiseCommunicator, lost  # noqa: E402
from holdfast.parallel.comm.protocol import AbortSignal, MembershipChange  # noqa: E402
from holdfast.parallel.errors import ConfigError, PeerLost  # noqa: E402

_SPINS = 100
_PAUSE_S = 5e-5
_DRAIN_S = 5.0

_LIBRARY = ctypes.CDLL(MPI.__file__)  # its calls let other threads run

logger = logging.getLogger("holdfast.comm")


def _begin() -> None:
    """Start MPI in this process. Collective over the job.

    mpi4py would let no other thread run while it waits for the other processes, and these may come
    only after they have heard from the store that a thread of this one serves. Checkpoints and
    aborts call MPI from threads of their own.
    """
    allowed = ctypes.c_int()
    failed = _LIBRARY.MPI_Init_thread(None, None, MPI.THREAD_MULTIPLE, ctypes.byref(allowed))
    if failed or allowed.value != MPI.THREAD_MULTIPLE:
        raise ConfigError(
            f"parallel.backend = 'mpi' needs an MPI with MPI_THREAD_MULTIPLE; MPI_Init_thread "
            f"returned {failed} and level {allowed.value}; use 'gloo', or another MPI"
        )
    for comm in (MPI.COMM_SELF, MPI.COMM_WORLD):
        comm.Set_errhandler(MPI.ERRORS_RETURN)
    atexit.register(end)


def end() -> None:
    """End MPI in this process. Collective over the job: mpirun calls it a failure if it lacks.

    It may wait for ever for a process that has died, so one that has survived a loss ends with
    `os._exit`.
    """
    if not MPI.Is_finalized():
        _LIBRARY.MPI_Finalize()


if not MPI.Is_initialized():
    _begin()


class _Channel:
    """One MPI communicator and its operations under way."""

    def __init__(self, comm: MPI.Intracomm, ranks: Sequence[int]) -> None:
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.comm = comm
        self.place = {rank: place for place, rank in enumerate(ranks)}
        self.open: set[_Message] = set()
        """Messages without a known end. They survive an abort: MPI may hold their buffers."""
        self.is_broken = False

    def revoke(self) -> None:
        """Make every operation on it fail, here and on all members. Local, at once."""
        self.is_broken = True
        try:
            self.comm.Revoke()
        except (MPI.Exception, NotImplementedError) as error:
            logger.warning("a communicator cannot be revoked (mpirun --with-ft ulfm): %s", error)

    def drain(self) -> None:
        """Release the buffers that MPI has released, once the communicator is revoked."""
        deadline = time.monotonic() + _DRAIN_S
        while self.open and time.monotonic() < deadline:
            self.open = {message for message in self.open if not message.has_ended()}


class _Message:
    """One message under way; keeps its buffer alive."""

    __slots__ = ("channel", "comm", "number", "operation", "peer", "request", "signal", "tensor")

    def __init__(
        self, comm: MpiCommunicator, tensor: Tensor, peer: int, operation: str, number: int
    ) -> None:
        self.comm = comm
        self.channel = comm.channel
        self.signal = comm.family.signal
        self.tensor = tensor
        self.peer = peer
        self.operation = operation
        self.number = number
        self.request: MPI.Request | None = None

    def wait(self) -> None:
        recorder = self.comm.family.recorder
        since = recorder.waiting(self.number)
        assert self.request is not None
        tests = 0
        try:
            self.signal.check()
            while not self.request.Test():
                self.signal.check()
                tests += 1
                time.sleep(0 if tests < _SPINS else _PAUSE_S)
        except (MPI.Exception, PeerLost) as error:
            recorder.finished(self.number, failed=True, since=since)
            self.signal.check()
            raise lost(self.operation, self.comm.name, self.peer, error) from error
        recorder.finished(self.number, since=since)
        self.channel.open.discard(self)

    def has_ended(self) -> bool:
        try:
            return self.request is None or self.request.Test()
        except MPI.Exception:
            return True


class MpiFamily:
    """The parts that the MPI communicators of one rank share, as `GlooMesh` does over gloo."""

    def __init__(
        self,
        world: Sequence[int],
        rank: int,
        kinds: Sequence[str],
        signal: AbortSignal,
        recorder: FlightRecorder,
    ) -> None:
        """Collective over all processes of the MPI job.

        Args:
            kinds: the names of the groups that will be formed, equal on all ranks; the position of
                a name keeps the forming of groups apart.
        Raises:
            ConfigError: MPI did not start these processes as `world`.
        """
        job = MPI.COMM_WORLD
        if tuple(world) != tuple(range(job.Get_size())) or rank != job.Get_rank():
            raise ConfigError(
                f"parallel.backend = 'mpi', but rank {rank} of {len(world)} is rank "
                f"{job.Get_rank()} of {job.Get_size()} to MPI; start the workers with "
                "mpirun --with-ft ulfm, as many as the layout has ranks"
            )
        self.rank = rank
        self.recorder = recorder
        self._kinds = ("world", *kinds)
        self.ranks = tuple(world)
        self.world = _Channel(job.Dup(), self.ranks)
        self._channels: list[_Channel] = [self.world]
        self._abandoned: list[_Channel] = []
        """Revoked channels. MPI still holds their buffers, so these must not be reused."""
        self._enter(signal)

    def _enter(self, signal: AbortSignal) -> None:
        self.signal = signal
        signal.listen(self._revoke_busy)

    def _revoke_busy(self, reason: str) -> None:
        for channel in tuple(self._channels):
            if channel.open:
                channel.revoke()

    def form(self, ranks: Sequence[int], kind: str) -> _Channel:
        """A communicator over some of the live ranks. Collective over `ranks`.

        Raises:
            PeerLost: one of the ranks is gone.
        """
        if tuple(ranks) == self.ranks and kind == "world":
            return self.world
        places = [self.world.place[rank] for rank in ranks]
        group = self.world.comm.Get_group().Incl(places)
        try:
            channel = _Channel(self.world.comm.Create_group(group, self._kinds.index(kind)), ranks)
        except MPI.Exception as error:
            raise lost("forming a group", kind, None, error) from error
        self._channels.append(channel)
        return channel

    def edit(self, ranks: Sequence[int], change: MembershipChange, signal: AbortSignal) -> None:
        """Enter the generation of `change`, once. Collective over `ranks`.

        Args:
            signal: the abort signal of that generation.
        Raises:
            ConfigError: ranks join, which an MPI job does not allow.
            PeerLost: further ranks are gone, or ULFM is not switched on.
        """
        if change.generation == self.signal.generation:
            return
        if change.joined:
            raise ConfigError(
                f"ranks {sorted(change.joined)} cannot join: an MPI job keeps its processes; "
                "use parallel.backend = 'gloo' for runs that grow"
            )
        broken = self.signal.reason is not None
        self.recorder.set_generation(change.generation)
        self._enter(signal)
        if broken:
            self._shrink(ranks)
        elif tuple(ranks) != self.ranks:
            old = self.world
            places = [old.place[rank] for rank in ranks]
            group = old.comm.Get_group().Incl(places)
            self.world = _Channel(old.comm.Create_group(group, len(self._kinds)), ranks)
            self.ranks = tuple(ranks)
            self._replace(old, self.world)

    def _shrink(self, ranks: Sequence[int]) -> None:
        """Continue with the live ranks.

        Blocks until the ranks that left are dead; agents kill them.
        """
        old = self.world
        old.revoke()
        try:
            survivors = cast("MPI.Intracomm", old.comm.Shrink())
        except (MPI.Exception, NotImplementedError) as error:
            raise lost("shrinking", "world", None, error) from error
        places = survivors.Get_group().Translate_ranks(None, old.comm.Get_group())
        alive = tuple(self.ranks[place] for place in places)
        self.world, self.ranks = _Channel(survivors, alive), alive
        self._replace(old, self.world)
        if alive != tuple(ranks):
            missing = sorted(set(ranks) - set(alive)) or sorted(set(alive) - set(ranks))
            raise PeerLost(
                f"{len(alive)} ranks live, but generation {self.signal.generation} is said to have "
                f"{len(ranks)}; they differ by {missing}; agree on a new generation"
            )

    def _replace(self, old: _Channel, new: _Channel | None) -> None:
        if old.is_broken:
            old.drain()
        if old.open:
            self._abandoned.append(old)
        self._channels = [c for c in self._channels if c is not old]
        if new is not None:
            self._channels.append(new)

    def keeps(self, channel: _Channel) -> bool:
        """Whether every member still has the channel intact.

        Collective over its members, all alive.
        """
        try:
            agreed = channel.comm.Agree(int(not (channel.is_broken or channel.open)))
        except MPI.Exception:
            agreed = 0
        return bool(agreed)

    def drop(self, channel: _Channel) -> None:
        """Abandon a communicator without freeing it: that would wait for all its members."""
        if channel is not self.world:
            if not channel.is_broken:
                channel.revoke()
            self._replace(channel, None)


class MpiCommunicator(PairwiseCommunicator):
    """A group of ranks over MPI, for CPU tensors. Exact-mode safe."""

    def __init__(self, family: MpiFamily, name: str, ranks: Sequence[int]) -> None:
        """Collective over `ranks`.

        Args:
            name: the group's kind: "world" or a mesh axis.
        """
        super().__init__(name, ranks, family.rank, family.signal, family.recorder)
        self.family = family
        self.name = name
        self.channel = family.form(ranks, name)

    def _message(
        self, tensor: Tensor, peer: int, tag: int, operation: str, *, is_send: bool
    ) -> _Message:
        if tensor.device.type != "cpu":
            raise ConfigError(
                f"parallel.backend = 'mpi' carries CPU tensors, but this one is on "
                f"{tensor.device}; set train.device = 'cpu' or use 'nccl'"
            )
        assert tensor.is_contiguous(), "messages are contiguous"
        family, channel = self.family, self.channel
        size = tensor.numel() * tensor.element_size()
        direction = "send" if is_send else "receive"
        number = family.recorder.post(self._group_code, operation, direction, peer, size, tag)
        message = _Message(self, tensor, peer, operation, number)
        channel.open.add(message)  # before the check: an abort that comes after it revokes
        buffer = (MPI.memory.fromaddress(tensor.data_ptr(), size), MPI.BYTE)
        post: Any = channel.comm.Isend if is_send else channel.comm.Irecv
        try:
            family.signal.check()
            message.request = post(buffer, channel.place[peer], tag)
        except (MPI.Exception, PeerLost) as error:
            channel.open.discard(message)
            family.recorder.finished(number, failed=True)
            family.signal.check()
            raise lost(operation, self.name, peer, error) from error
        family.recorder.started(number)
        return message

    @property
    def edit_needs_agreement(self) -> bool:
        return True

    def edit(
        self, ranks: Sequence[int], change: MembershipChange, signal: AbortSignal
    ) -> MpiCommunicator:
        """See `Communicator.edit`.

        Collective over `ranks`: either all of them were aborted or none.
        """
        if self.name == "world":
            self.family.edit(ranks, change, signal)
            if self.channel is not self.family.world:
                return MpiCommunicator(self.family, self.name, ranks)
        elif tuple(ranks) != self.ranks or not self.family.keeps(self.channel):
            self.family.drop(self.channel)
            return MpiCommunicator(self.family, self.name, ranks)
        self._enter(self.family.signal)
        return self


def build_mpi_groups(
    rank: int,
    world: Sequence[int],
    axes: Mapping[str, Sequence[int]],
    *,
    signal: AbortSignal,
    recorder: FlightRecorder,
) -> tuple[MpiCommunicator, dict[str, MpiCommunicator]]:
    """The world communicator of this rank, and its communicator along each axis.

    Collective over the whole MPI job.

    Args:
        axes: the ranks of each group; the same axes on every rank.
    Raises:
        ConfigError: MPI did not start these processes as `world`.
    """
    family = MpiFamily(world, rank, tuple(axes), signal, recorder)
    whole = MpiCommunicator(family, "world", world)
    return whole, {a: MpiCommunicator(family, a, ranks) for a, ranks in axes.items()}
