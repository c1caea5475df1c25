"""The communicator protocol: all messages between ranks go through it.

Nothing else in the project imports `torch.distributed` collectives or MPI directly.

Work is stopped in three ways, each with one meaning. `abort(reason)` makes every wait and call of
its object raise; any thread may call it, and it never blocks. `cancel()` gives up one piece of work
whose result is not needed. `close()` releases the resources of an object once its work has ended;
its owner calls it, and it may block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from holdfast.parallel.comm.flight_recorder import Operation
from holdfast.parallel.errors import PeerLost

if TYPE_CHECKING:
    from torch.distributed import Store

ReduceOp = Literal["sum", "max"]


class Handle(Protocol):
    """A running operation. Its buffers must not be touched before `wait` returns."""

    def wait(self) -> None:
        """Block until the operation is done.

        Raises:
            PeerLost: a peer or the group is gone, or the generation was aborted. The buffers'
                contents are then undefined. Receive buffers must be dropped, not used again, until
                the communicators have been edited.
        """
        ...


@dataclass(frozen=True, slots=True)
class MembershipChange:
    """The differences of a generation's ranks from the last.

    A replaced rank has left and joined.
    """

    generation: int
    left: frozenset[int] = field(default=frozenset())
    joined: frozenset[int] = field(default=frozenset())
    kept: bool = False
    """Whether all ranks that stay have reported their connections intact and idle.

    Peers then keep their connections without asking each other."""
    store: Store | None = None
    """The store where the new generation's ranks meet; None: the store of the old generation."""

    @property
    def changed(self) -> frozenset[int]:
        return self.left | self.joined


class AbortSignal:
    """Whether one generation has been aborted on one rank, and the first reason."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._listeners: list[Callable[[str], None]] = []

    def listen(self, listener: Callable[[str], None]) -> None:
        """Have the aborting thread call `listener(reason)`; at once if it was aborted before."""
        with self._lock:
            self._listeners.append(listener)
            reason = self.reason
        if reason is not None:
            listener(reason)

    def abort(self, reason: str) -> None:
        """Abort the generation. From any thread; blocks only as long as the listeners do."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(reason)

    def check(self) -> None:
        """Raise `PeerLost` if the generation was aborted."""
        if self.reason is not None:
            raise PeerLost(f"generation {self.generation} was aborted: {self.reason}")


class Communicator(Protocol):
    """A group of ranks. All members make the collective calls, in the same order.

    Exact-mode safe: sums are taken in member order, whatever arrives first.
    """

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks of the members, in member order."""
        ...

    @property
    def index(self) -> int:
        """This process's position in `ranks`."""
        ...

    @property
    def size(self) -> int: ...

    @property
    def signal(self) -> AbortSignal:
        """The abort signal of this communicator's generation."""
        ...

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Handle:
        """Reduce `tensor` in place over all members. Collective."""
        ...

    def reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor]) -> Handle:
        """Set `output` to the sum over members m of m's `inputs[self.index]`. Collective.

        Sizes may differ by member.
        """
        ...

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> Handle:
        """Set `outputs[m]` to member m's `tensor`; sizes may differ by member. Collective."""
        ...

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Handle:
        """Set `outputs[m]` to member m's `inputs[self.index]`; sizes may differ. Collective.

        Between members that have nothing for each other there is no message.

        Expert parallelism sends tokens to their experts this way, and context parallelism
        exchanges sequence parts for heads.
        """
        ...

    def send(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        """Send to the member with global rank `peer`; matched by (peer, tag).

        `tag` is in [0, 2**30). Between one sender and one receiver, receives are posted in the
        order of the sends, so that transports without tags (NCCL) match them too.
        """
        ...

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        """Receive into `tensor` from the member with global rank `peer`."""
        ...

    def barrier(self) -> None:
        """Return once every member has called it. Collective."""
        ...

    def abort(self, reason: str) -> None:
        """Abort the generation: waits and calls of all the rank's communicators raise `PeerLost`.

        Local, from any thread, within some milliseconds. It needs no answer from a peer, which may
        be dead, stopped or cut off. Every surviving rank calls `edit` next.
        """
        ...

    @property
    def carries_short_messages(self) -> bool:
        """Whether a message may be shorter than the tensor into which it is received."""
        ...

    @property
    def edit_needs_agreement(self) -> bool:
        """Whether ranks must agree, before they edit, that the old generation was aborted."""
        ...

    def edit(
        self, ranks: Sequence[int], change: MembershipChange, signal: AbortSignal
    ) -> Communicator:
        """The communicator over `ranks` in the generation of `change`.

        Every rank of the new generation edits all its communicators, the same ones in the same
        order, the world before its parts. No operation may be under way, unless the old generation
        was aborted. If no member has changed, the result is this object. Otherwise it is a new one,
        which takes over the connections between members that stay. gloo and NCCL edit locally;
        MPI's edit is collective over `ranks`.

        Args:
            signal: the abort signal of the new generation, one for all communicators of the rank.
        Raises:
            PeerLost: the new generation was aborted meanwhile, or a member is gone (MPI).
            ConfigError: ranks join and the transport cannot admit them (MPI).
        """
        ...

    def history(self) -> tuple[Operation, ...]:
        """The communicator's newest operations, one per message, in the order of the calls."""
        ...
