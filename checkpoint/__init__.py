"""Saving and loading state in any layout. May import `holdfast.parallel` and `holdfast._native`.

For any torch program: `save`, `load` and `Checkpointer`. The trainer uses the parts below them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.checkpoint.api import Checkpointer, load, save

__all__ = ["Checkpointer", "load", "save"]


def __getattr__(name: str) -> Any:
    # Looked up late: the command line reads manifests without torch.
    if name in __all__:
        from holdfast.checkpoint import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
