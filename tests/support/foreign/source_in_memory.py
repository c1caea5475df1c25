"""Source tensors of a conversion that lie in memory as a file has them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from holdfast.checkpoint.convert.elements.pieces import LogicalTensor, SourceTensor, stored
from holdfast.checkpoint.format.dtypes import DTYPE_NAMES


@dataclass
class Source:
    """Tensors one after the other in memory, as a file has them."""

    content: bytearray = field(default_factory=lambda: bytearray(64))
    tensors: list[SourceTensor] = field(default_factory=list)

    def add(
        self, key: str, value: Tensor, full: tuple[int, ...] | None = None, **shard: int
    ) -> None:
        offset = len(self.content)
        value = value.contiguous()
        self.content += value.reshape(-1).view(torch.uint8).numpy().tobytes()
        self.content += bytes(-len(self.content) % 8)
        self.tensors.append(
            stored(
                key,
                DTYPE_NAMES[value.dtype],
                tuple(value.shape),
                "memory",
                offset,
                shard=tuple(shard.items()),
                full_shape=full,
            )
        )

    def read(self, tensor: LogicalTensor, dtype: torch.dtype) -> Tensor:
        """Every element from its piece; the first of its locations."""
        values = torch.zeros(tensor.shape, dtype=dtype)
        flat = torch.frombuffer(self.content, dtype=torch.uint8)
        for piece in tensor.pieces:
            terms = [
                flat[location.offset :][
                    : flat[location.offset :].numel() // dtype.itemsize * dtype.itemsize
                ]
                .clone()
                .view(dtype)
                .as_strided(piece.box.shape, location.strides)
                for location in piece.locations
            ]
            total = terms[0] if tensor.combine == "equal" else sum(terms[1:], terms[0])
            values[piece.box.slices] = total / len(terms) if tensor.combine == "mean" else total
        return values

    def read_padded(self, tensor: LogicalTensor) -> Tensor:
        """A tensor float32 whose pieces without a location are zeros."""
        kept = tuple(piece for piece in tensor.pieces if piece.locations)
        return self.read(replace(tensor, pieces=kept), torch.float32)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
