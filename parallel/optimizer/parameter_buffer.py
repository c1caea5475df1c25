"""One rank's parameters in one flat buffer, so that spans of blocks travel without packing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from holdfast.parallel.layout import ParameterSpec

ALIGNMENT_ELEMENTS = 64
"""Local parameters start at multiples of this: 64 bytes or more for every dtype in use."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The position of one segment of a local parameter in the flat buffer."""

    layer: int
    spec_index: int
    """The row in its layer's parameter table."""
    spec: ParameterSpec
    offset: int
    """The first element in the flat buffer."""
    parameter: nn.Parameter = field(compare=False, repr=False)
    """The local parameter with this segment."""


class ParameterBuffer:
    """Moves a rank's parameters into one flat buffer; the modules keep working on views of it.

    Every local parameter starts at a 64-byte boundary: for small shapes, torch's CPU matrix
    products of unaligned operands differ in the last bits. Local; exact-mode safe.
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, ParameterSpec, nn.Parameter]],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Move the parameters.

        Args:
            rows: (layer index, table row, the local parameter with it), in layer then table order.
            dtype, device: the type and device of the buffer if the rank holds no parameter.
        """
        self._place: dict[nn.Parameter, tuple[int, int]] = {}
        end = 0
        for _, _, parameter in rows:
            if parameter not in self._place:
                self._place[parameter] = (end, end + parameter.numel())
                padded = -(-parameter.numel() // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
                end += padded
        if rows:
            dtype, device = rows[0][2].dtype, rows[0][2].device
        self.values: Tensor = torch.zeros(end, dtype=dtype, device=device)
        for parameter, (start, stop) in self._place.items():
            view = self.values[start:stop].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
        spec_index: dict[int, int] = {}
        segments = []
        for layer, spec, parameter in rows:
            index = spec_index.get(layer, 0)
            spec_index[layer] = index + 1
            offset = self._place[parameter][0] + spec.local_row * spec.row_elements
            segments.append(Segment(layer, index, spec, offset, parameter))
        self.segments: tuple[Segment, ...] = tuple(segments)

    @property
    def elements(self) -> int:
        """The length of the flat buffer, padding included."""
        return self.values.numel()

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        return self._place.keys()

    def place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The half-open range of the flat buffer that holds `parameter`."""
        return self._place[parameter]

    def view(self, values: Tensor, segment: Segment) -> Tensor:
        """The segment's part of a buffer laid out like `values`, in the segment's shape."""
        stop = segment.offset + segment.spec.elements
        return values[segment.offset : stop].view(segment.spec.box.shape)
