"""How a reader ends that is given any text: under limits of memory and of processor time.

The only right ends are a value, and one line that says what is wrong.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from holdfast.parallel.errors import HoldfastError

MOST_BYTES = 256 << 20
"""The memory that a reader may ask for, beyond what the process has."""
MOST_CPU_S = 5.0
_MOST_CHARACTERS = 6000


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit what this process may ask for during the block: memory, and processor time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _endless)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def _endless(*_: object) -> None:
    raise TimeoutError(f"no end within {MOST_CPU_S:g} s of processor time")


def outcome(read: Callable[[bytes], object], content: bytes) -> str:
    """ "accepted", "refused", or what went wrong."""
    try:
        read(content)
    except HoldfastError as error:
        text = str(error)
        clear = text and len(text) < _MOST_CHARACTERS and text.isprintable()
        return "refused" if clear else f"unclear: {text[:500]!r}"
    except BaseException:
        return traceback.format_exc()[-3000:]
    return "accepted"
