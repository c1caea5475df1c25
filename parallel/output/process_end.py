"""The end of a process that a person started: an exit code, and a line for an error."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from holdfast.parallel.errors import HoldfastError, process_refusal
from holdfast.parallel.output.standard_streams import stream_error
from holdfast.parallel.output.terminal import tell


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command and return the process's exit code. Local.

    An error that a person can mend is one line on standard error. Others are raised.
    """
    try:
        return command()
    except HoldfastError as error:
        tell(f"holdfast: {process_refusal(error) or error}")
        return error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        if not (reason := process_refusal(error) or _reason(error)):
            raise
        tell(f"holdfast: {reason}")
        return 1
    except KeyboardInterrupt:
        return 130


def leave(code: int) -> NoReturn:
    """End this process with an exit code; what it has said is written first. Local."""
    stream_error()
    if any(thread.daemon for thread in threading.enumerate()):
        # A thread in native code at the end of the interpreter would end the process with SIGABRT.
        os._exit(code)
    gc.freeze()  # a last collection of what torch has made takes half a second of a core
    sys.exit(code)


def _reason(error: Exception) -> str:
    """What the machine refused; empty: something else went wrong."""
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{place}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return f"there is not enough memory{f': {error}' if str(error) else ''}"
    return ""
