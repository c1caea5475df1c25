"""What errors say is one line that a terminal can show, whatever raised them."""

from __future__ import annotations

import errno
import os

import pytest

from holdfast.parallel.errors import HoldfastError, first_line, in_a_line, process_refusal


@pytest.mark.parametrize(
    ("error", "first", "with_kind"),
    [
        (ValueError("wrong"), "wrong", "ValueError: wrong"),
        (RuntimeError("refused\nraised from socket.cpp"), "refused", "RuntimeError: refused"),
        (OSError("\x1b[2Jcleared"), "\\x1b[2Jcleared", "OSError: \\x1b[2Jcleared"),
        (TimeoutError(), "TimeoutError", "TimeoutError"),
        (ValueError("\nbelow"), "ValueError", "ValueError"),
    ],
)
def test_an_error_of_any_kind_is_said_in_a_line(
    error: Exception, first: str, with_kind: str
) -> None:
    assert first_line(error) == first
    assert in_a_line(error) == with_kind


def raised_from(cause: BaseException) -> HoldfastError:
    """The error of a caller that cannot do its work because of another."""
    error = HoldfastError("this rank cannot listen for others")
    error.__cause__ = cause
    return error


NO_THREAD = RuntimeError(os.strerror(errno.EAGAIN))
"""What C++ says when a thread may not begin, e.g. the one of a gloo device."""


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (NO_THREAD, True),
        (RuntimeError(f"{NO_THREAD}\nbelow it, torch's stack"), True),
        (RuntimeError("can't start new thread"), True),
        (BlockingIOError(errno.EAGAIN, "no process"), True),
        (raised_from(NO_THREAD), True),
        (raised_from(raised_from(NO_THREAD)), True),
        (RuntimeError("address already in use"), False),
        (BlockingIOError(errno.EAGAIN, "a file that another writes", "file"), False),
        (raised_from(BlockingIOError(errno.EAGAIN, "a lock that another holds")), False),
        (raised_from(RuntimeError("address already in use")), False),
        (HoldfastError("without a cause"), False),
    ],
)
def test_a_thread_that_may_not_begin_is_told_wherever_it_was_needed(
    error: Exception, refused: bool
) -> None:
    assert ("ulimit -u" in process_refusal(error)) == refused
