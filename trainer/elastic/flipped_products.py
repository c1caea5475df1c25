"""A fault on purpose: bits that flip in the results of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
_EVERY = 7
"""One of so many products has a wrong bit: one or more in each micro-batch."""
_BITS = {torch.float32: (torch.int32, 21), torch.float64: (torch.int64, 50)}
"""By dtype, the integers of its bits, and a high bit of its mantissa."""


class FlippedProducts:
    """Flips a bit of one element of some products of this thread, while asked for. Local.

    As a block it costs nothing until then.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing flips yet."""
        self._clock, self._until_s = clock, -1.0
        self._mode: _FlippingMode | None = None
        self._is_inside = False

    def flip_for(self, seconds: float) -> None:
        """Have bits flip from now on; with 0 seconds, a single one."""
        self._until_s = self._clock() + seconds
        if self._is_inside:
            self._begin(once=not seconds)

    def __enter__(self) -> None:
        self._is_inside = True
        if self._clock() < self._until_s:
            self._begin(once=False)

    def __exit__(self, *error: object) -> None:
        self._is_inside = False
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def _begin(self, *, once: bool) -> None:
        if self._mode is None:
            self._mode = _FlippingMode(once=once)
            self._mode.__enter__()


class _FlippingMode(TorchDispatchMode):
    def __init__(self, *, once: bool) -> None:
        super().__init__()
        self._count, self._once = 0, once

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().startswith(_PRODUCTS) and isinstance(result, Tensor) and result.numel():
            self._count += 1
            if self._count == _EVERY if self._once else self._count % _EVERY == 0:
                self._flip(result)
        return result

    def _flip(self, values: Tensor) -> None:
        integers, bit = _BITS.get(values.dtype, (torch.int16, 6))
        values.view(integers).view(-1)[self._count % values.numel()] ^= 1 << bit
