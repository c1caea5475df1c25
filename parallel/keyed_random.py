"""Random numbers without state: every draw is a function of a key and an element's index.

The generator is Philox4x32-10 (Salmon et al. 2011). Element i of a logical tensor depends only on
the key and on i. So a shard draws its own part, and no layout changes a number. Exact-mode safe.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast import _native

_ROUNDS = 10
_MASK = 0xFFFFFFFF
_DROPOUT = {
    torch.float32: _native.dropout_scale_f32,
    torch.bfloat16: _native.dropout_scale_bf16,
    torch.float64: _native.dropout_scale_f64,
}


class StreamKey(NamedTuple):
    """The 128 bits that name one stream of numbers."""

    key: int
    stream: int


def stream_key(seed: int, *parts: str | int) -> StreamKey:
    """The key of the draws named by `seed` and `parts`; different names give unrelated streams."""
    text = repr((int(seed), *(p if isinstance(p, str) else int(p) for p in parts)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return StreamKey(int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))


def normal_box_(
    tensor: Tensor, key: StreamKey, *, row: int, column: int, total_columns: int, std: float
) -> None:
    """Fill a matrix with its part of a logical matrix of independent normal draws.

    Args:
        tensor: float32 or float64 [rows, columns] on CPU, contiguous.
        row, column: the first row and column in the logical matrix, which has `total_columns`
            columns.
    """
    fill = (
        _native.philox_normal_box_f64
        if tensor.dtype == torch.float64
        else _native.philox_normal_box_f32
    )
    rows, columns = tensor.shape
    fill(
        tensor.data_ptr(), rows, columns, row, column, total_columns, key.key, key.stream, 0.0, std
    )


def dropout(value: Tensor, key: StreamKey, *, offset: int, probability: float) -> Tensor:
    """Zero each element with `probability` and scale the others by 1 / (1 - probability).

    Args:
        value: float of any shape; its flat element 0 is element `offset` of the logical tensor.
    """
    value = value.contiguous()
    kernel = _DROPOUT.get(value.dtype) if value.device.type == "cpu" else None
    if kernel is not None:
        output = torch.empty_like(value)
        kernel(
            output.data_ptr(),
            value.data_ptr(),
            value.numel(),
            key.key,
            key.stream,
            offset,
            probability,
        )
        return output
    draws = philox_uint32(value.numel(), key, offset, value.device).view(value.shape)
    keep = draws >= math.floor(probability * 2**32)
    return torch.where(keep, value * (1.0 / (1.0 - probability)), 0.0)


def philox_uint32(count: int, key: StreamKey, offset: int, device: torch.device) -> Tensor:
    """Elements [offset, offset + count) of a stream as int64 in [0, 2**32), by torch operations.

    It serves devices and dtypes without the native kernel, and gives the same numbers.
    """
    first, last = offset // 4, (offset + count + 3) // 4
    index = torch.arange(first, last, dtype=torch.int64, device=device)
    counter = [
        index & _MASK,
        index >> 32,
        torch.full_like(index, key.stream & _MASK),
        torch.full_like(index, key.stream >> 32),
    ]
    low, high = key.key & _MASK, key.key >> 32
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(counter[0], 0xD2511F53)
        high1, low1 = _multiply(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ low, low1, high0 ^ counter[3] ^ high, low0]
        low, high = (low + 0x9E3779B9) & _MASK, (high + 0xBB67AE85) & _MASK
    flat = torch.stack(counter, dim=1).reshape(-1)
    return flat[offset - 4 * first : offset - 4 * first + count]


def _multiply(value: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The high and low words of a 32 x 32 bit product, within int64."""
    low_product = value * (constant & 0xFFFF)
    high_product = value * (constant >> 16)
    middle = high_product + (low_product >> 16)
    return (middle >> 16) & _MASK, ((middle << 16) | (low_product & 0xFFFF)) & _MASK
