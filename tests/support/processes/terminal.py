"""A terminal that remembers what is shown on it, and a program that runs on one."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable
from typing import TextIO

_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)


class Screen:
    """What a terminal shows and has scrolled away, as rows. It wraps rows anew when resized."""

    def __init__(self, columns: int, rows: int) -> None:
        self._columns, self._height = columns, rows
        self._rows: list[tuple[str, bool]] = [("", False)]
        """Each with whether it goes on in the next, as it was too long."""
        self._row = self._column = self._top = 0

    @property
    def lines(self) -> list[str]:
        """All lines since the beginning, as they were written, without empty ones at the end."""
        joined = "".join(text if goes_on else f"{text}\n" for text, goes_on in self._rows)
        return [line.rstrip() for line in joined.rstrip().splitlines()]

    def feed(self, text: str) -> None:
        """Show what a program has written."""
        for number, kind, char in _TOKEN.findall(text):
            if char:
                self._put(char)
            elif kind == "A":
                self._row = max(self._top, self._row - int(number or 1))
            elif kind == "J":
                self._rows[self._row :] = [(self._rows[self._row][0][: self._column], False)]
            else:
                assert kind == "m", f"an unknown escape {number}{kind}"

    def resize(self, columns: int, rows: int) -> None:
        """Become wider or narrower; longer rows are wrapped, and the cursor stays at its text."""
        ends = sum(not goes_on for _, goes_on in self._rows[: self._row])
        lines: list[str] = []
        begun = ""
        for text, goes_on in self._rows:
            begun += text
            if not goes_on:
                lines.append(begun.rstrip())
                begun = ""
        self._columns, self._height, self._rows = columns, rows, []
        for number, line in enumerate(lines):
            if number == ends:
                self._row = len(self._rows)
            parts = [line[i : i + columns] for i in range(0, len(line), columns)] or [""]
            self._rows += [*((part, True) for part in parts[:-1]), (parts[-1], False)]
        assert self._column == 0, "the cursor rests at the beginning of a row"
        self._top = max(0, len(self._rows) - rows)

    def _put(self, char: str) -> None:
        if char == "\r":
            self._column = 0
        elif char == "\n":
            self._next_row()
        else:
            text = self._rows[self._row][0].ljust(self._column)
            if self._column == self._columns:
                self._rows[self._row] = (text, True)
                self._next_row()
                self._column, text = 0, ""
            column = self._column
            self._rows[self._row] = (text[:column] + char + text[column + 1 :], False)
            self._column += 1

    def _next_row(self) -> None:
        self._row += 1
        if self._row == len(self._rows):
            self._rows.append(("", False))
        self._top = max(self._top, self._row + 1 - self._height)


class OnTerminal:
    """A function that runs in a child on a terminal of its own, and takes lines from the test."""

    def __init__(self, body: Callable[[TextIO], None], *, columns: int, rows: int) -> None:
        self.screen = Screen(columns, rows)
        self._master, slave = os.openpty()
        # A read may end within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._set_size(columns, rows)
        reader, self._writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._writer)
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            for number in (0, 1, 2):
                os.dup2(slave, number)
            code = 1
            try:
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                body(os.fdopen(reader))
                code = 0
            finally:
                os._exit(code)
        os.close(reader)
        os.close(slave)

    def tell(self, line: str) -> None:
        """Send a line to the body."""
        os.write(self._writer, f"{line}\n".encode())

    def resize(self, columns: int, rows: int) -> None:
        """Resize the terminal."""
        self.screen.resize(columns, rows)
        self._set_size(columns, rows)

    def show_until(self, condition: Callable[[list[str]], bool], timeout_s: float = 20.0) -> None:
        """Show what the body writes until this holds of the lines."""
        end_s = time.monotonic() + timeout_s
        while not condition(self.screen.lines):
            assert time.monotonic() < end_s, "\n".join(self.screen.lines)
            self._show(0.05)

    def end(self) -> int:
        """Send the end of all lines, show the rest, and return the exit code of the body."""
        os.close(self._writer)
        _, status = os.waitpid(self.pid, 0)
        while self._show(0.05):
            pass
        os.close(self._master)
        return os.waitstatus_to_exitcode(status)

    def _show(self, wait_s: float) -> bool:
        if not select.select([self._master], [], [], wait_s)[0]:
            return False
        try:
            text = os.read(self._master, 1 << 16)
        except OSError:  # nothing has it open any more
            return False
        self.screen.feed(self._decoder.decode(text))
        return True

    def _set_size(self, columns: int, rows: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)
