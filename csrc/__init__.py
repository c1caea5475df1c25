"""Holdfast: pretraining over many machines, with the same bits whichever of them die.

Other programs use `checkpoint`, `parallel.offload`, `parallel.schedules` and `trainer.data`; what
they may catch is here. Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

_attribute, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """What is imported on first use, and the version."""
    if name != "__version__":
        return _attribute(name)
    from importlib.metadata import version

    return version("holdfast")


def __dir__() -> list[str]:
    """The names above; `import holdfast` alone gives all of them."""
    return [*_names(), "__version__"]
