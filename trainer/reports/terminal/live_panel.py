"""A panel at the end of a terminal's text, redrawn in place; lines are printed above it and stay.

rich's own `Live` loses its place when the terminal becomes narrower than what it drew.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.text import Text

COLUMNS = 76
"""The widest panel: a terminal that stays wider has no line of it to wrap."""
_EVERY_S = 0.25


class LivePanel:
    """The panel. Used by any thread; `soon` by a signal's handler as well.

    The cursor rests below it and is never hidden, so that a killed process leaves a sound terminal.
    """

    def __init__(self, console: Console, draw: Callable[[], RenderableType]) -> None:
        """Draw the panel, and again as it changes.

        Args:
            draw: returns what is in the panel now; called by any thread.
        """
        self._console, self._draw = console, draw
        self._lock = threading.RLock()
        self._widths: list[int] = []
        """The columns of each line of the panel as it is on the screen."""
        self._drawn = ""
        self._size = self._measured()
        self._soon: deque[str] = deque()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="holdfast-panel", daemon=True)
        self.refresh()
        self._thread.start()

    def print(self, shown: RenderableType) -> None:
        """Print above the panel."""
        with self._lock:
            # Text is not wrapped here: who resizes a terminal has it wrapped by that.
            text = self._rendered(lambda: self._console.print(shown, soft_wrap=_is_line(shown)))
            self._write(text)

    def soon(self, line: str) -> None:
        """Print a line above the panel in a moment, from a thread of its own."""
        self._soon.append(line)

    def refresh(self) -> None:
        """Draw the panel again if it has changed, or the terminal has."""
        with self._lock:
            while self._soon:
                self.print(Text(self._soon.popleft()))
            if self._panel()[0] != self._drawn or self._measured() != self._size:
                self._write("")

    def close(self) -> None:
        """Remove the panel, and leave what is above it."""
        self._over.set()
        self._thread.join()
        with self._lock:
            self.refresh()
            self._console.file.write(self._erasing())
            self._console.file.flush()
            self._widths = []

    def _keep(self) -> None:
        while not self._over.wait(_EVERY_S):
            self.refresh()

    def _write(self, above: str) -> None:
        """Write text in the place of the panel, and the panel below it, at once."""
        erasing = self._erasing()
        self._size = self._measured()
        self._drawn, self._widths = self._panel()
        self._console.file.write(f"{erasing}{above}{self._drawn}")
        self._console.file.flush()

    def _erasing(self) -> str:
        """What goes back to the first line of the panel, and clears the rest of the screen.

        A terminal that has become narrower has wrapped the lines that were wider.
        """
        width, height = self._measured()
        rows = sum(max(1, -(-columns // max(1, width))) for columns in self._widths)
        rows = min(rows, height - 1)
        return f"\r\x1b[{rows}A\x1b[J" if rows else ""

    def _panel(self) -> tuple[str, list[int]]:
        """The panel as it is written, and the columns of its lines; its end if it is too high."""
        width, height = self._measured()
        text = self._rendered(lambda: self._console.print(self._draw(), width=min(width, COLUMNS)))
        lines = text.splitlines()[-max(1, height - 1) :]
        widths = [Text.from_ansi(line).cell_len for line in lines]
        return "".join(f"{line}\n" for line in lines), widths

    def _measured(self) -> tuple[int, int]:
        """Columns and rows of the terminal that is written to; rich's console asks others first."""
        with contextlib.suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(self._console.file.fileno())
            if columns and rows:
                return columns, rows
        return self._console.size

    def _rendered(self, show: Callable[[], None]) -> str:
        with self._console.capture() as captured:
            show()
        return captured.get()


def _is_line(shown: RenderableType) -> bool:
    return isinstance(shown, Text)
