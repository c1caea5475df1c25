"""Which parts of holdfast an installation has: the elastic ones can be taken off."""

from __future__ import annotations

import importlib.util

from holdfast.parallel.errors import ConfigError

ELASTIC = ("holdfast.elastic", "holdfast.trainer.elastic")
"""The folders that only elastic runs need."""


def elastic_problem(what: str) -> str:
    """What is wrong with asking for `what`, which needs all of `ELASTIC`; empty if all is here."""
    missing = [folder for folder in ELASTIC if importlib.util.find_spec(folder) is None]
    if not missing:
        return ""
    return f"{what}: this installation has no {' and no '.join(missing)}; install all of holdfast"


def require_elastic(what: str) -> None:
    """Raise `ConfigError` where `what` needs folders that are not installed."""
    if problem := elastic_problem(what):
        raise ConfigError(problem)
