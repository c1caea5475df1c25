"""The errors of a node's machine, as its agent hears of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from holdfast.launch.agent.main_thread_queue import MainThreadQueue
from holdfast.launch.agent.settings import AgentSettings
from holdfast.launch.machine_errors import ErrorWatch, MachineError


@contextlib.contextmanager
def watched_errors(
    settings: AgentSettings, main_thread: MainThreadQueue, leave: Callable[[str], None]
) -> Iterator[None]:
    """Look for errors of this machine during the block, and tell of them.

    Args:
        leave: called in the main thread with a serious one, for a person.
    """
    if settings.roots is None:
        yield
        return
    call = main_thread.forwarding(leave)

    def hear(errors: Sequence[MachineError]) -> None:
        if settings.on_machine_errors is not None:
            settings.on_machine_errors(errors)
        serious = [str(error) for error in errors if error.is_serious]
        if serious:
            call(", ".join(serious))

    with contextlib.closing(ErrorWatch(settings.roots, hear)):
        yield
