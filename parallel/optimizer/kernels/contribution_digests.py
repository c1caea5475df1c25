"""Digests of what one micro-batch adds to the integer sums of gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

from torch import Tensor

from holdfast.parallel.optimizer.kernels.dispatch import operations_of


class ContributionDigests:
    """By layer, the weighted sums modulo 2**64 of one micro-batch's gradients. Local.

    Such a sum is linear in the integers, so what a gradient adds to it is the difference of the
    sums' digests after and before. It depends neither on the order of gradients nor on the other
    micro-batches in the sums. Exact-mode safe: it changes nothing.
    """

    def __init__(self, micro_batch: int, places: Mapping[Hashable, tuple[int, int]]) -> None:
        """Nothing has been added.

        Args:
            micro_batch: the one whose gradients count.
            places: of each parameter, its layer and its place among the rank's parameters.
        """
        self.micro_batch, self._places = micro_batch, places
        self.by_layer: dict[int, int] = defaultdict(int)
        """By layer, the digest of what has been added."""

    def before(self, parameter: Hashable, sums: Tensor, *, first: bool) -> int:
        """The digest of a parameter's sums before a gradient is added.

        Args:
            first: whether the sums count as zero, whatever is in their memory.
        """
        return 0 if first else self._digest(parameter, sums)

    def after(self, parameter: Hashable, sums: Tensor, before: int) -> None:
        """Note the gradient that has been added since `before`."""
        layer, _ = self._places[parameter]
        added = self._digest(parameter, sums) - before
        self.by_layer[layer] = (self.by_layer[layer] + added) % 2**64

    def _digest(self, parameter: Hashable, sums: Tensor) -> int:
        place = self._places[parameter][1]
        return operations_of(sums.device).bit_sums([(sums.view(-1), place)])[0]
