"""The split of a chunk's layers over a tensor-parallel group, and its collectives.

The collectives are f and g of Shoeybi et al. 2019, and those of Korthikanti et al. 2022 for
sequence parallelism. A hidden state is float[seq, batch, hidden] on every rank or, with sequence
parallelism, float[seq / T, batch, hidden]. Exact-mode safe within one tensor-parallel size, and
over all that divide the number of shards if a run has several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.parallel.comm import Communicator
from holdfast.parallel.tensor_parallel.strips import (
    ArrivingRows,
    Cut,
    Rows,
    WholeRows,
    leaving_sums,
)
from holdfast.parallel.tensor_parallel.sums import (
    sum_in_order,
    tree_everywhere,
    tree_sum,
)


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The split of a chunk's layers: the group (None: one rank), and of sequences or not.

    A layer has one part for each rank, or as many as the run has shards (`numerics.tensor_shards`):
    then each rank computes several of them one by one, as so many ranks would.
    """

    group: Communicator | None
    sequence_parallel: bool
    shards: int = 1
    """The parts of each layer, a power of two that the group's size divides; 1: one for each rank,
    whose partial sums are added in the order of the ranks."""
    strips: int = 1
    """The strips of a slice's tokens in which layers are computed, a multiple of the group's size,
    beside their communication; 1: they are computed as one."""
    strips_per_message: int = 1
    """The strips that travel together, at most."""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return 1 if self.group is None else self.group.size

    @property
    def index(self) -> int:
        """This rank's index in the group."""
        return 0 if self.group is None else self.group.index

    @property
    def parts(self) -> int:
        """The number of parts of each layer."""
        return max(self.shards, self.size)

    @property
    def own_parts(self) -> range:
        """The parts of this rank."""
        count = self.parts // self.size
        return range(self.index * count, (self.index + 1) * count)

    def whole(self, value: Tensor) -> Tensor:
        """The hidden state of all tokens, without autograd. Collective."""
        return self._gathering(value).whole()

    def arriving(self, value: Tensor) -> Rows:
        """The hidden state of all tokens, in the strips that are computed. Collective."""
        cut = self._cut(value.shape[0])
        return self._gathering(value) if cut is None else ArrivingRows(cut, value)

    def sum(self, partials: Sequence[Tensor]) -> Tensor:
        """The sum of all parts' partial hidden states, without autograd. Collective.

        Args:
            partials: of each own part, for all tokens; they are overwritten.
        Returns:
            The hidden state of this rank's tokens.
        """
        return self._scattering(tree_sum(partials))()

    def leaving(
        self, product: Callable[[slice], Sequence[Tensor]], rows: int
    ) -> Callable[[], Tensor]:
        """Begin the sum of all parts' partial products, beside computation. Collective.

        Args:
            product: rows of tokens -> of each own part, the partial product for them, which is
                overwritten.
            rows: the rows of all tokens.
        Returns:
            Gives what `sum` does, once the other ranks' products have arrived.
        """
        cut = self._cut(rows // self.size)
        if cut is None:
            return self._scattering(tree_sum(product(slice(0, rows))))
        return leaving_sums(cut, lambda part: tree_sum(product(part)), self._add)

    def _cut(self, rows: int) -> Cut | None:
        """The cut of this rank's rows of tokens; None: they stay whole."""
        if self.strips == 1:
            return None
        return Cut(self.group, rows, self.strips // self.size, self.strips_per_message)

    def _add(self, partials: Sequence[Tensor]) -> Tensor:
        return (tree_sum if self.shards > 1 else sum_in_order)(partials)

    def _gathering(self, value: Tensor) -> Rows:
        if self.group is None or not self.sequence_parallel:
            return WholeRows(value)
        gathered = value.new_empty(self.size * value.shape[0], *value.shape[1:])
        parts = list(gathered.chunk(self.size))
        return WholeRows(gathered, self.group.all_gather(parts, value.contiguous()))

    def _scattering(self, own: Tensor) -> Callable[[], Tensor]:
        """Begin the sum of the ranks' partial hidden states; `own` may be overwritten."""
        if self.group is None:
            return lambda: own
        if not self.sequence_parallel:
            return lambda: self.sum_everywhere(own)
        sent = list(own.contiguous().chunk(self.size))
        received = [torch.empty_like(sent[self.index]) for _ in sent]
        handle = self.group.all_to_all(received, sent)

        def finish() -> Tensor:
            handle.wait()
            return self._add(received)

        return finish

    def sum_everywhere(self, value: Tensor) -> Tensor:
        """The sum of the ranks' tensors, without autograd. Collective; may overwrite `value`."""
        if self.group is None:
            return value
        if self.shards > 1:
            return tree_everywhere(value, self.group)
        value = value.contiguous()
        self.group.all_reduce(value).wait()
        return value

    def largest(self, value: Tensor) -> Tensor:
        """The elementwise largest of the ranks' tensors. Collective; may overwrite `value`."""
        if self.group is not None:
            self.group.all_reduce(value, "max").wait()
        return value

    def element_offset(self, value: Tensor) -> int:
        """The index of a hidden state's first element in the logical [seq, batch, hidden]."""
        return self.index * value.numel() if self.sequence_parallel else 0
