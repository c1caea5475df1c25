"""Communicators over torch's process groups: gloo for CPU tensors, NCCL for CUDA tensors.

Groups are built directly on a store, without torch's process-wide default group, so that one process
can hold several generations of groups and drop one without touching another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from holdfast.parallel.comm import Handle, ReduceOp
from holdfast.parallel.errors import PeerLost

if TYPE_CHECKING:
    from torch.distributed import Store, Work

_COLLECTIVE_TAG = 1 << 30
_SMALL_BYTES = 1 << 18
"""Up to here gloo's all_reduce takes longer than sending everything to everybody (measured 1.5 ms
against 0.15 ms for 1 KiB at 2 ranks)."""


@dataclass(slots=True)
class _WorkHandle:
    """A torch Work; keeps its buffer alive and names the operation and the peer when it fails."""

    work: Work
    buffer: Tensor
    operation: str
    group: str
    peer: int | None = None

    def wait(self) -> None:
        try:
            self.work.wait()
        except RuntimeError as error:
            raise _lost(self.operation, self.group, self.peer, error) from error


@dataclass(slots=True)
class _Handles:
    handles: Sequence[Handle]

    def wait(self) -> None:
        for handle in self.handles:
            handle.wait()


@dataclass(slots=True)
class _ReduceInOrder:
    """Receives every member's part, then combines the parts in member order: equal on each member."""

    received: Handle
    parts: Sequence[Tensor]
    output: Tensor
    op: ReduceOp = "sum"

    def wait(self) -> None:
        self.received.wait()
        self.output.copy_(self.parts[0])
        for part in self.parts[1:]:
            if self.op == "sum":
                self.output.add_(part)
            else:
                torch.maximum(self.output, part, out=self.output)


_DONE = _Handles(())


def _lost(operation: str, group: str, peer: int | None, error: RuntimeError) -> PeerLost:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    with_peer = "" if peer is None else f" with rank {peer}"
    return PeerLost(f"{operation}{with_peer} in group {group} failed, a rank is gone: {reason}")


def _reduce_options(op: ReduceOp) -> dist.AllreduceOptions:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
    return options


class _PairwiseCollectives:
    """Collectives made of point-to-point messages, which take uneven sizes; members share no state."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int) -> None:
        self._name = name
        self._ranks = tuple(ranks)
        self._index = self._ranks.index(rank)
        self._member_of = {member: index for index, member in enumerate(self._ranks)}
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

    def send(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        raise NotImplementedError

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        raise NotImplementedError

    def reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor]) -> Handle:
        own = inputs[self._index]
        if self.size == 1:
            output.copy_(own)
            return _DONE
        parts = [own if m == self._index else torch.empty_like(output) for m in range(self.size)]
        return _ReduceInOrder(self.all_to_all(parts, inputs), parts, output)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> Handle:
        return self.all_to_all(outputs, [tensor] * self.size)

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Handle:
        tag = _COLLECTIVE_TAG + self._collectives % (1 << 20)
        self._collectives += 1
        if outputs[self._index] is not inputs[self._index]:
            outputs[self._index].copy_(inputs[self._index])
        handles: list[Handle] = []
        for distance in range(1, self.size):
            source = (self._index - distance) % self.size
            target = (self._index + distance) % self.size
            handles.append(self.receive(outputs[source], self._ranks[source], tag))
            handles.append(self.send(inputs[target], self._ranks[target], tag))
        return _Handles(handles)


class GlooCommunicator(_PairwiseCollectives):
    """A group of ranks over gloo (TCP). Exact-mode safe.

    gloo's own reduce_scatter takes about twice as long as its all_reduce, so that and the other
    scattered collectives are pairwise exchanges.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        ranks: Sequence[int],
        rank: int,
        *,
        device: object,
        timeout_s: float,
    ) -> None:
        """Collective over `ranks`: every member constructs the group under the same `name`.

        Args:
            store: rendezvous store that all members reach.
            device: made by `gloo_device`; groups of one process may share it.
            timeout_s: how long an operation may take before its waiters get `PeerLost`.
        """
        super().__init__(name, ranks, rank)
        self._group: Any = None
        if self.size > 1:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [device]
            options._timeout = timedelta(seconds=timeout_s)
            try:
                self._group = gloo(dist.PrefixStore(name, store), self.index, self.size, options)
            except RuntimeError as error:
                raise _lost("rendezvous", name, None, error) from error

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Handle:
        if self._group is None:
            return _DONE
        if tensor.numel() * tensor.element_size() <= _SMALL_BYTES:
            return self._all_reduce_small(tensor, op)
        try:
            work = self._group.allreduce([tensor], _reduce_options(op))
        except RuntimeError as error:
            raise _lost("all_reduce", self._name, None, error) from error
        return _WorkHandle(work, tensor, "all_reduce", self._name)

    def _all_reduce_small(self, tensor: Tensor, op: ReduceOp) -> Handle:
        """Everybody sends everything: one round of messages instead of gloo's several."""
        own = tensor.clone(memory_format=torch.contiguous_format)
        parts = [own if m == self.index else torch.empty_like(own) for m in range(self.size)]
        received = self.all_to_all(parts, [own] * self.size)
        return _ReduceInOrder(received, parts, tensor, op)

    def send(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        assert self._group is not None, "a group of one rank has nobody to send to"
        try:
            work = self._group.send([tensor], self._member_of[peer], tag)
        except RuntimeError as error:
            raise _lost("send", self._name, peer, error) from error
        return _WorkHandle(work, tensor, "send", self._name, peer)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        assert self._group is not None, "a group of one rank has nobody to receive from"
        try:
            work = self._group.recv([tensor], self._member_of[peer], tag)
        except RuntimeError as error:
            raise _lost("receive", self._name, peer, error) from error
        return _WorkHandle(work, tensor, "receive", self._name, peer)

    def barrier(self) -> None:
        if self._group is None:
            return
        try:
            self._group.barrier().wait()
        except RuntimeError as error:
            raise _lost("barrier", self._name, None, error) from error


class NcclCommunicator(_PairwiseCollectives):
    """A group of ranks over NCCL. Exact-mode safe for integer sums; NCCL_ALGO fixes float orders.

    NCCL has no tags and runs the operations of one communicator in order, so each (sender, receiver)
    pair gets a communicator of its own, made at first use; the callers post receives in the order of
    the sends. Handles order the current stream after the operation; they do not block the host.
    """

    def __init__(
        self, store: Store, name: str, ranks: Sequence[int], rank: int, *, timeout_s: float
    ) -> None:
        """Collective over `ranks`: every member constructs the group under the same `name`."""
        super().__init__(name, ranks, rank)
        self._store = store
        self._timeout_s = timeout_s
        self._group = self._new_group(name, self.index, self.size) if self.size > 1 else None
        self._channels: dict[tuple[int, int], Any] = {}

    def _new_group(self, name: str, index: int, size: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        return dist.ProcessGroupNCCL(dist.PrefixStore(name, self._store), index, size, options)

    def _channel(self, source: int, target: int) -> Any:
        key = (source, target)
        if key not in self._channels:
            name = f"{self._name}/{source}-{target}"
            self._channels[key] = self._new_group(name, int(self.index == target), 2)
        return self._channels[key]

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Handle:
        if self._group is None:
            return _DONE
        work = self._group.allreduce([tensor], _reduce_options(op))
        return _WorkHandle(work, tensor, "all_reduce", self._name)

    def send(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        work = self._channel(self.index, self._member_of[peer]).send([tensor], 1, tag)
        return _WorkHandle(work, tensor, "send", self._name, peer)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        work = self._channel(self._member_of[peer], self.index).recv([tensor], 0, tag)
        return _WorkHandle(work, tensor, "receive", self._name, peer)

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device="cuda")).wait()
        torch.cuda.synchronize()


def gloo_device(host: str) -> object:
    """A gloo transport bound to the interface of `host`; loopback when that is where the store is."""
    if host in {"127.0.0.1", "localhost", "::1"}:
        return dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    return dist.ProcessGroupGloo.create_default_device()


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups one rank belongs to in one generation."""

    world: GlooCommunicator | NcclCommunicator
    control: GlooCommunicator
    """All ranks over gloo: votes are CPU tensors whatever the device."""
    tensor: GlooCommunicator | NcclCommunicator
    pipeline: GlooCommunicator | NcclCommunicator


def build_groups(
    store: Store,
    host: str,
    rank: int,
    world: Sequence[int],
    tensor: Sequence[int],
    pipeline: Sequence[int],
    *,
    backend: str,
    generation: int,
    timeout_s: float = 600.0,
) -> Groups:
    """Form this rank's groups. Collective over `world`.

    Args:
        backend: "gloo" or "nccl", for everything but votes.
        generation: part of every group's name, so that groups of two generations never meet.
        timeout_s: see `GlooCommunicator`; positive and finite.
    """
    assert timeout_s > 0
    device = gloo_device(host)

    def gloo(kind: str, ranks: Sequence[int]) -> GlooCommunicator:
        name = f"g{generation}/{kind}/{ranks[0]}"
        return GlooCommunicator(store, name, ranks, rank, device=device, timeout_s=timeout_s)

    def group(kind: str, ranks: Sequence[int]) -> GlooCommunicator | NcclCommunicator:
        if backend == "gloo":
            return gloo(kind, ranks)
        name = f"g{generation}/{kind}/{ranks[0]}"
        return NcclCommunicator(store, name, ranks, rank, timeout_s=timeout_s)

    control = gloo("world", world)
    return Groups(
        world=control if backend == "gloo" else group("world", world),
        control=control,
        tensor=group("tensor", tensor),
        pipeline=group("pipeline", pipeline),
    )
