"""Standard output and errors without a reader, a character or room on the disk end no process."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import signal
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PIECE_BYTES = select.PIPE_BUF
"""As much as a pipe that is ready takes without blocking."""
_LEFT_OUT = b"\n[output that was not read in time is left out here]\n"
_PLAIN: dict[str, str] = dict(zip("■□▁▂▃▄▅▆▇█━╸╺…", "#-_.-=+*%@---.", strict=True))
"""Characters of our own output for a terminal that lacks them."""


class SafeStream(io.RawIOBase):
    """A descriptor whose errors are noted instead of raised. Used by one text stream."""

    def __init__(self, descriptor: int) -> None:
        """Write to an open descriptor, which stays open."""
        self._descriptor = descriptor
        self.error: OSError | None = None
        """The first error."""
        self.patience_s: float | None = None
        """Seconds for which a reader that does not read is waited for; None: for ever."""
        self._behind = False
        """Whether the reader does not read at present."""

    def write(self, data: Buffer, /) -> int:
        """Write some of the data, or leave all of it out. Returns the number of bytes done with."""
        view = memoryview(data).cast("B")
        if self._is_late():
            self._behind = True
            return len(view)
        piece = view if self.patience_s is None else view[:_PIECE_BYTES]
        try:
            if self._behind:
                self._behind = False
                os.write(self._descriptor, _LEFT_OUT)
                return 0 if self._is_late() else os.write(self._descriptor, piece)
            return os.write(self._descriptor, piece)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.error = self.error or error
            return len(view)

    def _is_late(self) -> bool:
        """Wait for the reader. Returns whether it does not read in time."""
        patience_s = 0.0 if self._behind else self.patience_s
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return not poll.poll(None if patience_s is None else 1000 * patience_s)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def make_streams_safe() -> None:
    """Let neither a closed descriptor nor a reader that is gone, nor a full disk, raise from now.

    Text of another encoding than UTF-8 gets plain characters in place of those that it lacks.
    Call it first in a program.
    """
    codecs.register_error("holdfast", _plain)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The next opened file would take the number, and prints would go there.
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _safe(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _safe(sys.stderr, sys.__stderr__, 2)


def _safe(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    """The safe stream in place of `stream`, unless a program has put its own there."""
    if stream is not original and stream is not None:
        return stream
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            stream.flush()
    raw = SafeStream(descriptor)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=(stream.encoding if stream is not None else None) or "utf-8",
        errors="holdfast",
        line_buffering=descriptor == 2 or raw.isatty() or getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def outlive_readers(patience_s: float = 1.0) -> None:
    """Have a process whose records are files outlive its terminal and its readers.

    Args:
        patience_s: seconds for which a reader that does not read is waited for.
    """
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for raw in _raw_streams():
        raw.patience_s = patience_s


def stream_error() -> str:
    """The reason why output was lost on a disk or device; empty if none was.

    A reader that is gone, as `head`, has all that it wanted.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    errors = [raw.error for raw in _raw_streams() if raw.error is not None]
    lost = [error for error in errors if error.errno not in (errno.EPIPE, errno.ECONNRESET)]
    return str(lost[0].strerror) if lost else ""


def _raw_streams() -> list[SafeStream]:
    raws = [getattr(getattr(s, "buffer", None), "raw", None) for s in (sys.stdout, sys.stderr)]
    return [raw for raw in raws if isinstance(raw, SafeStream)]


def _plain(error: UnicodeError) -> tuple[str, int]:
    """The handler of characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(char, "?") for char in lacking), error.end
