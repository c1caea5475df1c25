"""The progress of a command, shown on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from holdfast.parallel.output import plain_console


@contextmanager
def shown_progress(
    what: str, *, threaded: bool = True
) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error during the block, if that is a terminal.

    Yields a function of the bytes done and the bytes in all, if these are known.

    Args:
        threaded: whether a thread draws it; without one, the block can fork processes.
    """
    console = plain_console(errors=True)
    columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(
        *columns,
        transient=True,
        auto_refresh=threaded,
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, refresh=not threaded)

        yield show
