"""The state that a process has from its parent, and that its work must not depend on."""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType
from typing import NoReturn

from holdfast.parallel.output.standard_streams import make_streams_safe

_PR_SET_NAME = 15


def begin_process() -> None:
    """Begin a process whatever its parent left: safe streams, and signals that arrive.

    A parent that ignores SIGCHLD would have the kernel forget the exit codes of workers; one that
    blocks signals would keep SIGTERM and SIGINT from being heard. Call it first in a program, in
    its main thread, before torch is imported.
    """
    make_streams_safe()
    # torch's C++ warns of connections, which are reported otherwise.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def name_process(part: str) -> None:
    """Name this process for `ps -e`, `top` and `pstree`; by default it has its parent's name.

    The kernel keeps 15 bytes. Call it in the main thread.

    Args:
        part: what the process is in a run.
    """
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"holdfast {part}".encode(), 0, 0, 0)


def unwind_when_told() -> None:
    """Have SIGTERM and SIGHUP end the process as an interrupt does: what it made goes on the way.

    The second one ends it at once. A signal that the parent has it ignore stays so.
    """

    def end(number: int, _: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
