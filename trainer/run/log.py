"""The log file of one worker; every line has its rank, generation and step."""

from __future__ import annotations

import logging
from collections.abc import Callable

from holdfast.parallel.output import LogFile
from holdfast.trainer.run.run_directory import RunDirectory

_FORMAT = (
    "%(asctime)s rank %(rank)d generation %(generation)d step %(step)d "
    "%(levelname)s %(name)s: %(message)s"
)
_ROOT = "holdfast"


class _RunContext(logging.Filter):
    """Adds the worker's rank, generation and step to every line."""

    def __init__(self, rank: int, where: Callable[[], tuple[int, int]]) -> None:
        super().__init__()
        self.rank = rank
        self._where = where

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self.rank
        record.generation, record.step = self._where()
        return True


def log_to_file(run: RunDirectory, rank: int) -> None:
    """Send this process's log to the file of its rank."""
    handler = LogFile(run.log(rank), _FORMAT)
    handler.addFilter(_RunContext(rank, lambda: (0, 0)))
    logger = logging.getLogger(_ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def locate_log(where: Callable[[], tuple[int, int]]) -> None:
    """Set the function that gives each line of this process's log file its generation and step.

    Args:
        where: returns the generation, and the step under way, counted from 1; called for every
            line, in any thread.
    """
    for handler in logging.getLogger(_ROOT).handlers:
        for context in list(handler.filters):
            if isinstance(context, _RunContext):
                handler.removeFilter(context)
                handler.addFilter(_RunContext(context.rank, where))
