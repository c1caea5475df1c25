"""What errors say is one line that a terminal can show, whatever raised them."""

from __future__ import annotations

import pytest

from holdfast.parallel.errors import first_line, in_a_line


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
