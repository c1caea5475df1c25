"""Text for a person: names from files and paths neither steer the terminal nor are markup.

Everything that a command prints goes through `say`, `tell`, `write` or a console of
`plain_console`.
"""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from holdfast.parallel.errors import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def say(line: str) -> None:
    """Print a line for a person to standard output."""
    print(printable(line), flush=True)  # noqa: T201


def tell(line: str) -> None:
    """Print a line for a person to standard error."""
    print(printable(line), file=sys.stderr, flush=True)  # noqa: T201


def write(text: str) -> None:
    """Write a part of a text to standard output: as it is, or as a terminal can show it."""
    shown = "\t".join(map(printable, text.split("\t"))) if sys.stdout.isatty() else text
    print(shown, end="", flush=True)  # noqa: T201


def plain_console(
    *, errors: bool = False, highlight: bool = True, terminal: bool | None = None
) -> Console:
    """A console that shows text as it is: no markup, and no names of emoji.

    Names from outside are made `printable` before they are given to it, since it leaves the
    characters that control a terminal.

    Args:
        errors: whether it writes to standard error.
        highlight: whether numbers and names are coloured on a terminal.
        terminal: False: no escapes, even if it writes to a terminal; None: as the stream is.
    """
    from rich.console import Console

    stream = sys.stderr if errors else sys.stdout
    return Console(
        file=stream, markup=False, emoji=False, highlight=highlight, force_terminal=terminal
    )


def plain_text(shown: RenderableType, *, width: int = 100) -> str:
    """What is shown, as a file takes it: this many columns, without escapes. Pure."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width, markup=False, emoji=False, color_system=None).print(shown)
    return text.getvalue()
