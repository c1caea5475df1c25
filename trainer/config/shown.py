"""A value of a configuration in an error message: short, on one line, whatever the value is."""

from __future__ import annotations

_MOST = 120
"""The most characters of a value that are shown."""


def shown(value: object) -> str:
    """The value as Python writes it, cut where it is long. Pure."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} and more"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a table with such a number in it, or nested too deeply
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST else text[: _MOST - 1] + "…"
