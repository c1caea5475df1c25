"""Pickles in which a tensor is its bytes: torch's own write an archive for each, which takes longer
than a small layout's step.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch


def dump(value: object) -> bytes:
    """The pickle of a value with tensors of a CPU; what shares memory does not share it after."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.device.type != "cpu":
            return NotImplemented
        plain = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _tensor, (plain, value.dtype, tuple(value.shape))


def _tensor(plain: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not plain:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(plain), dtype=dtype).reshape(shape)
