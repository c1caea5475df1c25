"""The communicator protocol: everything that ranks say to each other goes through it.

Nothing else in the project imports `torch.distributed` collectives or MPI directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

ReduceOp = Literal["sum", "max"]


class Handle(Protocol):
    """A running operation. Its buffers must not be touched before `wait` returns."""

    def wait(self) -> None:
        """Block until the operation is done. Raises `PeerLost` when a peer or the group is gone."""
        ...


class Communicator(Protocol):
    """A group of ranks. Collective calls are made by every member in the same order.

    Exact-mode safe: sums are taken in member order, whatever arrives first.
    """

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the members, in member order."""
        ...

    @property
    def index(self) -> int:
        """This process's place in `ranks`."""
        ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Handle:
        """Reduce `tensor` in place over all members."""
        ...

    def reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor]) -> Handle:
        """`output` becomes the sum over members m of m's `inputs[self.index]`; sizes may differ by member."""
        ...

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> Handle:
        """`outputs[m]` becomes member m's `tensor`; sizes may differ by member."""
        ...

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Handle:
        """`outputs[m]` becomes member m's `inputs[self.index]`."""
        ...

    def send(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        """Send to the member with global rank `peer`; matched by (peer, tag).

        `tag` is in [0, 2**30). Between one sender and one receiver, receives are posted in the order of
        the sends, so that transports without tags (NCCL) match them too.
        """
        ...

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        """Receive into `tensor` from the member with global rank `peer`."""
        ...

    def barrier(self) -> None:
        """Return when every member has called it."""
        ...
