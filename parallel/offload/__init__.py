"""Activations that wait on an SSD, or in host memory, for their backward pass.

`Offloader` is imported when it is asked for: what plans and reports need of this package needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.parallel.offload.amount import Amount, Bounds, drive_life_years
from holdfast.parallel.offload.heap import compact_heap_environment, restart_with_compact_heap
from holdfast.parallel.offload.report import OffloadReport

if TYPE_CHECKING:
    from holdfast.parallel.offload.offloader import Offloader

__all__ = [
    "Amount",
    "Bounds",
    "OffloadReport",
    "Offloader",
    "compact_heap_environment",
    "drive_life_years",
    "restart_with_compact_heap",
]


def __getattr__(name: str) -> Any:
    if name == "Offloader":
        from holdfast.parallel.offload.offloader import Offloader

        return Offloader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
