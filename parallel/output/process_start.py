"""The state that a process has from its parent, and that its work must not depend on."""

from __future__ import annotations

import signal

from holdfast.parallel.output.standard_streams import make_streams_safe


def begin_process() -> None:
    """Begin a process whatever its parent left: safe streams, and signals that arrive.

    A parent that ignores SIGCHLD would have the kernel forget the exit codes of workers; one that
    blocks signals would keep SIGTERM and SIGINT from being heard. Call it first in a program, in
    its main thread.
    """
    make_streams_safe()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
