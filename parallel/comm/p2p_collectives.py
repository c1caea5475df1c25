"""Collectives made of point-to-point messages: the same bits on every transport.

Every member adds parts in member order. So all hold equal sums, whichever part arrived first and
whichever transport carried it. Sizes may be uneven. Members share no state.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.comm.flight_recorder import FlightRecorder, Operation
from holdfast.parallel.comm.protocol import AbortSignal, Handle, ReduceOp
from holdfast.parallel.comm.tags import COLLECTIVES, EXCHANGES, TagRange
from holdfast.parallel.errors import PeerLost, first_line

SMALL_BYTES = 1 << 18
"""Up to this size each member sends its whole tensor to each other: one round instead of two."""
DIRECT_MEMBERS: int = 8
"""The largest group that uses direct messages. In larger groups, parts travel by doubling (Bruck et
al. 1997): log2(n) rounds, and only 2 log2(n) connections per rank."""


_COMBINE: Mapping[ReduceOp, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum}


@dataclass(slots=True)
class Handles:
    """Several operations as one."""

    handles: Sequence[Handle]

    def wait(self) -> None:
        for handle in self.handles:
            handle.wait()


@dataclass(slots=True)
class _ReduceInOrder:
    """Combines all members' parts in member order, once all have arrived: equal on each member."""

    received: Handle
    parts: Sequence[Tensor]
    output: Tensor
    op: ReduceOp = "sum"

    def wait(self) -> None:
        self.received.wait()
        self.output.copy_(self.parts[0])
        combine = _COMBINE[self.op]
        for part in self.parts[1:]:
            combine(self.output, part, out=self.output)


DONE = Handles(())


def lost(operation: str, group: str, peer: int | None, error: BaseException) -> PeerLost:
    """The error of an operation that failed, in one line."""
    with_peer = "" if peer is None else f" with rank {peer}"
    group = group.rstrip("<>")  # of a connection for one direction; see gloo.py
    return PeerLost(
        f"{operation}{with_peer} in group {group} failed, a rank is gone: {first_line(error)}"
    )


class PairwiseCommunicator:
    """The part of a communicator that all transports share; subclasses carry messages."""

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        rank: int,
        signal: AbortSignal,
        recorder: FlightRecorder,
    ) -> None:
        self._name = name
        self._ranks = tuple(ranks)
        self._index = self._ranks.index(rank)
        self._signal = signal
        self._recorder = recorder
        self._group_code = recorder.group(name)
        self._collectives = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        return self._ranks

    @property
    def index(self) -> int:
        return self._index

    @property
    def size(self) -> int:
        return len(self._ranks)

    @property
    def signal(self) -> AbortSignal:
        return self._signal

    @property
    def carries_short_messages(self) -> bool:
        return True

    @property
    def edit_needs_agreement(self) -> bool:
        return False

    @abstractmethod
    def _message(
        self, tensor: Tensor, peer: int, tag: int, operation: str, *, is_send: bool
    ) -> Handle:
        """Post one message of `operation` to or from the member with global rank `peer`."""

    def send(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        return self._message(tensor, peer, tag, "send", is_send=True)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        return self._message(tensor, peer, tag, "receive", is_send=False)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Handle:
        return self._all_reduce(tensor, op, "all_reduce")

    def _all_reduce(self, tensor: Tensor, op: ReduceOp, operation: str) -> Handle:
        if self.size == 1:
            return DONE
        if tensor.numel() * tensor.element_size() > SMALL_BYTES:
            return _ReduceThenGather(self, tensor, op)
        own = tensor.clone(memory_format=torch.contiguous_format)
        if self.size > DIRECT_MEMBERS:
            return _AllReduceByDoubling(self, own, tensor, op, operation)
        parts = [own if m == self._index else torch.empty_like(own) for m in range(self.size)]
        received = self._exchange(parts, [own] * self.size, operation)
        return _ReduceInOrder(received, parts, tensor, op)

    def reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor]) -> Handle:
        return self._reduce_scatter(output, inputs, "sum", "reduce_scatter")

    def _reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp, operation: str
    ) -> Handle:
        own = inputs[self._index]
        if self.size == 1:
            output.copy_(own)
            return DONE
        parts = [own if m == self._index else torch.empty_like(output) for m in range(self.size)]
        return _ReduceInOrder(self._exchange(parts, inputs, operation), parts, output, op)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> Handle:
        return self._exchange(outputs, [tensor] * self.size, "all_gather")

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Handle:
        return self._exchange(outputs, inputs, "all_to_all", EXCHANGES)

    def _exchange(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        operation: str,
        tags: TagRange = COLLECTIVES,
    ) -> Handle:
        tag = self._next_tag(tags)
        if outputs[self._index] is not inputs[self._index]:
            outputs[self._index].copy_(inputs[self._index])
        handles: list[Handle] = []
        # Another message is waited for first in each: only of that one the end is seen as it comes.
        turn = self._collectives % (self.size - 1) if self.size > 1 else 0
        for distance in (1 + (step + turn) % (self.size - 1) for step in range(self.size - 1)):
            source = self._ranks[(self._index - distance) % self.size]
            target = self._ranks[(self._index + distance) % self.size]
            incoming = outputs[(self._index - distance) % self.size]
            leaving = inputs[(self._index + distance) % self.size]
            if incoming.numel():
                handles.append(self._message(incoming, source, tag, operation, is_send=False))
            if leaving.numel():
                handles.append(self._message(leaving, target, tag, operation, is_send=True))
        return self._together(handles)

    def _together(self, handles: Sequence[Any]) -> Handle:
        """Several messages as one operation."""
        return Handles(handles)

    def _next_tag(self, tags: TagRange = COLLECTIVES) -> int:
        tag = tags.wrapped(self._collectives)
        self._collectives += 1
        return tag

    def barrier(self) -> None:
        self._all_reduce(torch.zeros(1), "sum", "barrier").wait()

    def abort(self, reason: str) -> None:
        self._signal.abort(reason)

    def history(self) -> tuple[Operation, ...]:
        return self._recorder.history(self._name)

    def _enter(self, signal: AbortSignal) -> None:
        """Continue in another generation; all members count collectives from 0 again."""
        self._signal = signal
        self._collectives = 0


class _ReduceThenGather:
    """A large all_reduce: each member reduces one part, in member order, and sends it to all."""

    def __init__(self, comm: PairwiseCommunicator, tensor: Tensor, op: ReduceOp) -> None:
        self._comm = comm
        self._target = tensor
        self._whole = tensor.reshape(-1)
        self._parts = self._whole.tensor_split(comm.size)
        self._own = torch.empty_like(self._parts[comm.index])
        self._reduced = comm._reduce_scatter(self._own, self._parts, op, "all_reduce")

    def wait(self) -> None:
        self._reduced.wait()
        comm = self._comm
        comm._exchange(self._parts, [self._own] * comm.size, "all_reduce").wait()
        if self._whole.data_ptr() != self._target.data_ptr():
            self._target.copy_(self._whole.view_as(self._target))


class _AllReduceByDoubling:
    """A small all_reduce in a large group: after round k, each member holds 2**k members' parts."""

    def __init__(
        self, comm: PairwiseCommunicator, own: Tensor, output: Tensor, op: ReduceOp, operation: str
    ) -> None:
        self._comm = comm
        self._parts = own.new_empty((comm.size, *own.shape))
        """Row j is the part of the j-th member after this one."""
        self._parts[0] = own
        self._output = output
        self._op: ReduceOp = op
        self._operation = operation
        self._tag = comm._next_tag()
        self._round = self._post(1)

    def _post(self, distance: int) -> Handle:
        comm = self._comm
        source = comm.ranks[(comm.index + distance) % comm.size]
        target = comm.ranks[(comm.index - distance) % comm.size]
        rows = min(distance, comm.size - distance)
        incoming, outgoing = self._parts[distance : distance + rows], self._parts[:rows]
        post = comm._message
        return comm._together(
            (
                post(incoming, source, self._tag, self._operation, is_send=False),
                post(outgoing, target, self._tag, self._operation, is_send=True),
            )
        )

    def wait(self) -> None:
        comm, distance = self._comm, 1
        while True:
            self._round.wait()
            distance *= 2
            if distance >= comm.size:
                break
            self._round = self._post(distance)
        ordered = [self._parts[(member - comm.index) % comm.size] for member in range(comm.size)]
        _ReduceInOrder(DONE, ordered, self._output, self._op).wait()
