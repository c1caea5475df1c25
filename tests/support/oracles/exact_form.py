"""The exact form of a value: equal for values with equal types and bits, and for no others."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def form_of(value: Any) -> Any:
    """The types and bits of a value, as something that `==` compares."""
    kind = type(value)
    if isinstance(value, np.generic | np.ndarray):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().view(-1).view(torch.uint8).tolist()
        return kind, value.dtype, tuple(value.shape), value.requires_grad, raw
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is complex:
        return kind, struct.pack(">dd", value.real, value.imag)
    if isinstance(value, Mapping):
        extra = getattr(value, "default_factory", None)
        return kind, extra, [(form_of(k), form_of(v)) for k, v in value.items()]
    if isinstance(value, list | tuple | deque):
        return kind, getattr(value, "maxlen", None), [form_of(item) for item in value]
    return kind, value
