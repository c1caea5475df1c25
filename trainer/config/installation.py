"""The parts of holdfast in an installation: the elastic folders can be removed."""

from __future__ import annotations

import importlib.util

from holdfast.parallel.errors import ConfigError

ELASTIC = ("holdfast.elastic", "holdfast.trainer.elastic")
"""The folders that only elastic runs need."""


def elastic_problem(what: str) -> str:
    """The problem with `what`, which needs all of `ELASTIC`; empty if there is none."""
    missing = [folder for folder in ELASTIC if importlib.util.find_spec(folder) is None]
    if not missing:
        return ""
    return f"{what}: this installation has no {' and no '.join(missing)}; install all of holdfast"


def require_elastic(what: str) -> None:
    """Raise `ConfigError` if folders that `what` needs are not installed."""
    if problem := elastic_problem(what):
        raise ConfigError(problem)
