"""Updates on the host, for optimizer state that lies there (as in Ren et al. 2021, ZeRO-Offload).

Gradients come to the host in the order of the update, and parameters go back, beside the update of
other blocks. Local; exact-mode safe: what is computed does not depend on it, but a CPU's kernels
may round otherwise than a GPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from holdfast.parallel.optimizer.flat_values import FlatValues
from holdfast.parallel.optimizer.parameter_buffer import OwnedParameters
from holdfast.parallel.optimizer.spans import Span


class HostUpdate:
    """The gradients of a rank's own blocks on the host, and the values that an update changes."""

    def __init__(
        self,
        parameters: OwnedParameters,
        places: Sequence[Span],
        gradients: FlatValues,
        master: FlatValues | None,
    ) -> None:
        """Allocate page-locked memory beside a GPU.

        Args:
            places: the places of the blocks in `parameters`, in their order in `gradients`.
            gradients: those of the blocks, flat, on the device.
            master: their master copies on the host; None: the parameters themselves are updated.
        """
        self._parameters, self._places = parameters, places
        self._device_gradients = gradients
        pinned = gradients.device.type == "cuda"
        make = partial(torch.empty, dtype=gradients.dtype, pin_memory=pinned)
        self.gradients = FlatValues(gradients.pieces, make)
        self._is_copy = master is None
        self.master = FlatValues(gradients.pieces, make) if master is None else master
        self._copied: dict[int, torch.cuda.Event] = {}

    def begin(self, runs: Sequence[tuple[int, int, Span]]) -> None:
        """Begin to copy what an update reads.

        Args:
            runs: (first block, block after the last, their elements), in the order of the update.
        """
        self._copied.clear()
        for first, last, span in runs:
            both = self.gradients, self._device_gradients
            pairs = zip(*(values.parts([span]) for values in both), strict=True)
            for here, there in pairs:
                here.copy_(there, non_blocking=True)
            if self._is_copy:
                start = span.start
                for place in self._places[first:last]:
                    values = self._parameters.part(place.start, place.stop)
                    master = self.master.part(start, start + place.elements)
                    master.copy_(values, non_blocking=True)
                    start += place.elements
            if self._device_gradients.device.type == "cuda":
                self._copied[first] = torch.cuda.Event()
                self._copied[first].record()

    def wait(self, first: int) -> None:
        """Wait for the copies of the run that begins with a block."""
        copied = self._copied.pop(first, None)
        if copied is not None:
            copied.synchronize()

    def write_back(self, first: int, last: int, start: int) -> None:
        """Begin to write updated values to the parameters of blocks [first, last).

        Args:
            start: their first element.
        """
        for place in self._places[first:last]:
            values = self._parameters.part(place.start, place.stop)
            values.copy_(self.master.part(start, start + place.elements), non_blocking=True)
            start += place.elements
