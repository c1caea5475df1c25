"""A warning, given once, that less is sent than could be. Local."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("holdfast.offload")


class FaultNotice:
    """Gives one warning and calls the user's function once."""

    def __init__(self, on_fault: Callable[[str], None] | None) -> None:
        """`on_fault` is called with the reason why activations stay in memory."""
        self._on_fault, self._is_told = on_fault, False

    def tell(self, fault: str) -> None:
        """Warn of `fault` unless it is empty or a warning was given before."""
        if not fault or self._is_told:
            return
        self._is_told = True
        message = f"activations stay in memory: {fault}"
        logger.warning("%s", message)
        if self._on_fault is not None:
            self._on_fault(message)
