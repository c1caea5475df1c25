"""What a rank's tokens brought to their experts, kept for the length of a step. Local.

The sums of an expert have gradients of all ranks that send it tokens. When a rank is lost with
them, the others compute these gradients again from what they keep here, and nothing else of the
micro-batches that are done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.parallel.layout import SharePlace, SliceKey


class ExpertInput(NamedTuple):
    """What the tokens of a slice brought to the experts of a layer."""

    tokens: Tensor
    """float[tokens, hidden]"""
    gradient: Tensor
    """float[tokens, hidden]: by the weighted sums of what came back."""
    experts: Tensor
    """int64[tokens, choices]"""
    weights: Tensor
    """float[tokens, choices]"""
    share: SharePlace

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self._values)

    @property
    def _values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens, self.gradient, self.experts, self.weights

    def moved(self, device: torch.device) -> ExpertInput:
        """The same on a device; from a GPU to host memory without waiting."""
        tokens, gradient, experts, weights = (_moved(value, device) for value in self._values)
        return ExpertInput(tokens, gradient, experts, weights, self.share)


def _moved(value: Tensor, device: torch.device) -> Tensor:
    if value.device == device:
        return value
    # Copies both ways are of one stream, so none begins before the one to here has ended.
    pinned = device.type == "cpu"
    there = torch.empty(value.shape, dtype=value.dtype, device=device, pin_memory=pinned)
    return there.copy_(value, non_blocking=True)


class ExpertInputs:
    """The inputs of experts that this rank's tokens brought in the running step. Local.

    They lie in host memory. Exact-mode safe: they are what the experts had, bit for bit.
    """

    def __init__(self, most_bytes: int) -> None:
        """Nothing is kept yet.

        Args:
            most_bytes: what is kept has at most so many; micro-batches that come later are not.
        """
        self._most_bytes, self._bytes, self._step = most_bytes, 0, -1
        self._found: dict[SliceKey, dict[int, ExpertInput]] = defaultdict(dict)

    def begin(self, step: int) -> None:
        """Keep what `step` brings from now on, and forget other steps."""
        if step != self._step:
            self.clear()
            self._step = step

    def keep(self, layer: int, key: SliceKey, value: ExpertInput) -> None:
        """Keep what a slice brought to a layer, if there is room."""
        before = self._found[key].get(layer)
        added = value.nbytes - (0 if before is None else before.nbytes)
        if self._bytes + added <= self._most_bytes:
            self._bytes += added
            self._found[key][layer] = value.moved(torch.device("cpu"))

    def of(self, layer: int, key: SliceKey) -> ExpertInput:
        """What a slice brought to a layer; it is there by `whole`."""
        return self._found[key][layer]

    def whole(self, step: int, layers: int) -> dict[SharePlace, list[SliceKey]]:
        """The slices of a step of which all of so many layers' inputs are here, by this rank's
        share."""
        found: dict[SharePlace, list[SliceKey]] = defaultdict(list)
        of_step = sorted(self._found.items()) if step == self._step else []
        for key, by_layer in of_step:
            shares = {value.share for value in by_layer.values()}
            if len(by_layer) == layers and len(shares) == 1:
                found[shares.pop()].append(key)
        return found

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()
        self._bytes = 0


class PassageInputs:
    """What a passage brings to the experts of a layer, until its backward pass is here."""

    def __init__(
        self,
        inputs: ExpertInputs,
        layer: int,
        slices: Sequence[SliceKey],
        experts: Sequence[Tensor],
        share: SharePlace,
    ) -> None:
        """Local.

        Args:
            experts: of each slice, int64[tokens, choices].
        """
        self._inputs, self._layer, self._share = inputs, layer, share
        self._slices, self._experts = slices, experts
        self._gradient: tuple[Tensor, Tensor] | None = None

    def note_gradient(self, gradient: Tensor, weights: Tensor) -> None:
        """Note the gradient by the passage's sums, and the weights of these: all slices' tokens."""
        self._gradient = gradient, weights

    def note_tokens(self, tokens: Tensor) -> None:
        """Note float[tokens, hidden] of all slices, which with the gradient is all that counts."""
        assert self._gradient is not None
        sizes = [len(of_slice) for of_slice in self._experts]
        of_slices = zip(*(value.split(sizes) for value in (tokens, *self._gradient)), strict=True)
        for key, chosen, (value, gradient, weights) in zip(
            self._slices, self._experts, of_slices, strict=True
        ):
            found = ExpertInput(
                value.detach(), gradient.detach(), chosen, weights.detach(), self._share
            )
            self._inputs.keep(self._layer, key, found)
        self._gradient = None
