"""A thread that looks at the errors of this machine every few seconds.

A thread of its own: what the kernel shows of a broken device may take long to read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from holdfast.launch.machine_errors.kinds import MachineError
from holdfast.launch.machine_errors.machine_errors import MachineErrors
from holdfast.launch.machine_errors.roots import MachineRoots

logger = logging.getLogger("holdfast.agent")

LOOK_S = 5.0
"""Seconds between two looks."""
_CLOSE_S = 1.0


class ErrorWatch:
    """Looks until it is closed. Make it after the last fork."""

    def __init__(
        self,
        roots: MachineRoots,
        on_errors: Callable[[Sequence[MachineError]], None],
        *,
        look_s: float = LOOK_S,
    ) -> None:
        """Begin to look.

        Args:
            on_errors: called in the thread of the watch with new errors, if there are any.
        """
        self._roots, self._on_errors, self._look_s = roots, on_errors, look_s
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._look, name="holdfast-machine-errors", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the watch; a look that takes long ends by itself."""
        self._closed.set()
        self._thread.join(_CLOSE_S)

    def _look(self) -> None:
        errors = MachineErrors(self._roots)
        try:
            while not self._closed.wait(self._look_s):
                if found := errors.look():
                    for error in found:
                        logger.warning("an error of this machine: %s: %s", error.kind, error)
                    self._on_errors(found)
        finally:
            errors.close()
