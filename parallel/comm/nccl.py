"""Communicators over NCCL, for CUDA tensors.

Communicators are built directly on a store, without torch's process-wide default group. So one
process can hold several generations of them and drop one without touching another.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from holdfast.parallel.comm.flight_recorder import Direction, FlightRecorder, Operation
from holdfast.parallel.comm.p2p_collectives import DONE, PairwiseCommunicator, lost
from holdfast.parallel.comm.protocol import AbortSignal, Handle, MembershipChange, ReduceOp
from holdfast.parallel.comm.tags import kind_of
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.reading import parse_json

if TYPE_CHECKING:
    from torch.distributed import Store, Work

_REDUCE_OPS: Mapping[ReduceOp, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(slots=True)
class _NcclHandle:
    """A torch Work on a stream; keeps its buffer alive and names the operation and the peer."""

    comm: NcclCommunicator
    work: Work
    buffer: Tensor
    operation: str
    number: int
    peer: int | None
    signal: AbortSignal

    def wait(self) -> None:
        self.comm.recorder.waiting(self.number)
        try:
            self.signal.check()
            self.work.wait()
            self.signal.check()
        except (RuntimeError, PeerLost) as error:
            self.comm.recorder.finished(self.number, failed=True)
            self.signal.check()
            raise lost(self.operation, self.comm.name, self.peer, error) from error


class NcclCommunicator(PairwiseCommunicator):
    """A group of ranks over NCCL. Exact-mode safe for integer sums; NCCL_ALGO fixes float orders.

    NCCL has no tags and runs the operations of one communicator in order. So each (sender,
    receiver) pair gets a communicator of its own for each kind of message, made at first use, and
    callers post the receives of a kind in the order of the sends. Handles order the current stream
    after the operation and do not block the host. A host that waits elsewhere (for the stream, for
    a value) therefore goes on, with undefined contents, when an abort has ended the kernels, and
    gets `PeerLost` from the next call or wait.

    Once one rank has aborted an NCCL communicator, all ranks must abort it, and none may destroy
    it, because destruction waits for the others. So `abort` ends every communicator of the rank,
    and aborted ones are never used again.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        ranks: Sequence[int],
        rank: int,
        *,
        timeout_s: float,
        signal: AbortSignal | None = None,
        recorder: FlightRecorder | None = None,
    ) -> None:
        """Collective over `ranks`: every member constructs the communicator under the same `name`.

        Args:
            signal: the abort signal of the generation, shared by the rank's communicators; None:
                one of its own.
            recorder: the flight recorder; None: one of its own.
        """
        signal = signal or AbortSignal(0)
        # Several groups of one kind need different names in the record, which has no members.
        recorded = f"{name}/{min(ranks)}"
        super().__init__(recorded, ranks, rank, signal, recorder or FlightRecorder(rank))
        self.name = name
        self.recorder = self._recorder
        self._rank = rank
        self._store = store
        self._timeout_s = timeout_s
        self._channels: dict[tuple[int, int, str], Any] = {}
        self._pending: deque[tuple[Work, int]] = deque()
        self._group: Any = None
        if self.size > 1:
            self._group = self._new_group(f"{name}/{self.ranks[0]}", self.index, self.size)
        signal.listen(self._abort_all)

    @property
    def carries_short_messages(self) -> bool:
        return False

    def _new_group(self, where: str, index: int, size: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        # Non-blocking calls can be aborted while the communicator is still being set up.
        options.config.blocking = 0
        prefix = f"{where}/{self._signal.generation}"
        # Read when a group is made: CUDA events are recorded around each operation's kernel.
        os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")
        return dist.ProcessGroupNCCL(dist.PrefixStore(prefix, self._store), index, size, options)

    def _channel(self, source: int, target: int, tag: int) -> Any:
        key = (source, target, kind_of(tag))
        channel = self._channels.get(key)
        if channel is None:
            where = f"{self.name}/{source}-{target}/{key[-1]}"
            channel = self._channels[key] = self._new_group(where, int(self._rank == target), 2)
            self._signal.check()  # an abort that came in between did not see this one
        return channel

    def _abort_all(self, reason: str) -> None:
        groups = [*self._channels.values()]
        if self._group is not None:
            groups.append(self._group)
        for group in groups:
            # Each thread waits for its own kernels to end; the caller waits for none.
            threading.Thread(target=group.abort, name="holdfast-comm-abort", daemon=True).start()

    def _record(self, operation: str, direction: Direction, peer: int, size: int, tag: int) -> int:
        self._signal.check()
        self._note_completed()
        return self._recorder.post(self._group_code, operation, direction, peer, size, tag)

    def _note_completed(self) -> None:
        """Record the operations whose kernels have ended.

        Local; asks the device and never waits.
        """
        while self._pending and self._pending[0][0].is_completed():
            work, number = self._pending.popleft()
            self._recorder.finished(number)
            if (seconds := _device_s(work)) is not None:
                self._recorder.timed(number, seconds)

    def _handle(
        self, work: Work, buffer: Tensor, operation: str, number: int, peer: int | None
    ) -> _NcclHandle:
        self._recorder.started(number)
        self._pending.append((work, number))
        return _NcclHandle(self, work, buffer, operation, number, peer, self._signal)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Handle:
        if self._group is None:
            return DONE
        size = tensor.numel() * tensor.element_size()
        self._collectives += 1
        number = self._record("all_reduce", "collective", -1, size, self._collectives)
        options = dist.AllreduceOptions()
        options.reduceOp = _REDUCE_OPS[op]
        try:
            work = self._group.allreduce([tensor], options)
        except RuntimeError as error:
            raise self._failed("all_reduce", number, None, error) from error
        return self._handle(work, tensor, "all_reduce", number, None)

    def _message(
        self, tensor: Tensor, peer: int, tag: int, operation: str, *, is_send: bool
    ) -> Handle:
        size = tensor.numel() * tensor.element_size()
        direction: Direction = "send" if is_send else "receive"
        number = self._record(operation, direction, peer, size, tag)
        try:
            if is_send:
                work = self._channel(self._rank, peer, tag).send([tensor], 1, tag)
            else:
                work = self._channel(peer, self._rank, tag).recv([tensor], 0, tag)
        except RuntimeError as error:
            raise self._failed(operation, number, peer, error) from error
        return self._handle(work, tensor, operation, number, peer)

    def _failed(
        self, operation: str, number: int, peer: int | None, error: RuntimeError
    ) -> PeerLost:
        self._recorder.finished(number, failed=True)
        self._signal.check()
        return lost(operation, self.name, peer, error)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device="cuda")).wait()
        torch.cuda.synchronize()
        self._signal.check()

    def history(self) -> tuple[Operation, ...]:
        self._note_completed()
        return super().history()

    def edit(
        self, ranks: Sequence[int], change: MembershipChange, signal: AbortSignal
    ) -> NcclCommunicator:
        """See `Communicator.edit`. Local.

        After an abort, nothing is kept. Otherwise, pairs that stay keep their communicators.
        """
        if change.store is not None:
            self._store = change.store
        aborted = self._signal.reason is not None
        if not aborted and tuple(ranks) == self.ranks and not change.changed & set(ranks):
            self._enter(signal)
            signal.listen(self._abort_all)
            return self
        renewed = NcclCommunicator(
            self._store,
            self.name,
            ranks,
            self._rank,
            timeout_s=self._timeout_s,
            signal=signal,
            recorder=self._recorder,
        )
        if not aborted:
            renewed._channels = {
                pair: channel
                for pair, channel in self._channels.items()
                if not change.changed & set(pair[:2])
            }
            self._abort_unused(renewed)
        return renewed

    def _abort_unused(self, renewed: NcclCommunicator) -> None:
        """End the parts that the renewed communicator did not take over; all members do so."""
        self._channels = {
            pair: channel
            for pair, channel in self._channels.items()
            if pair not in renewed._channels
        }
        self._abort_all("its members changed")


def _device_s(work: Any) -> float | None:
    """What an ended operation took by the CUDA events around it; None if they were not recorded.

    That is the time for which its kernel ran, which begins once all before it in its stream has
    ended, and ends when the message has moved.
    """
    try:
        return work._get_duration() / 1e3
    except RuntimeError:
        return None


def nccl_record() -> Any:
    """The operations in torch's flight recorder, as JSON values; None if there is no recorder.

    Local; waits for no device. torch keeps the newest 2,000 unless TORCH_FR_BUFFER_SIZE says
    otherwise.
    """
    native: Any = torch._C._distributed_c10d  # pyrefly: ignore
    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    dump = next((getattr(native, name) for name in names if hasattr(native, name)), None)
    return None if dump is None else parse_json(dump(onlyActive=True))
