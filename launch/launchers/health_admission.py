"""The admission of nodes by their health where a run asks for it: `elastic.health`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from holdfast.launch.agent import AgentSettings
from holdfast.launch.health import (
    HealthReport,
    NodeRefused,
    own_report,
    read_health,
    require_health,
    write_health,
)
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports import EventFile
from holdfast.trainer.run import RunDirectory

logger = logging.getLogger("holdfast.agent")


def report_of_this_node(
    config: RunConfig, run: RunDirectory, node: AgentSettings
) -> HealthReport | None:
    """What is found on this node, under its name in the run; None: the run does not ask."""
    if config.elastic.health == "off":
        return None
    return own_report(config, run.root, node.node)


def admit_founders(run: RunDirectory, start: str, reports: Sequence[HealthReport]) -> None:
    """Let the nodes that begin a run in, and keep their reports for those that join later.

    Args:
        start: the name of this start of the run.
    Raises:
        NodeRefused: some are sick; an event tells of each.
    """
    with _told(run):
        found = require_health(reports)
    try:
        write_health(run, start, found)
    except OSError as error:
        logger.warning("nodes that join are not held to those of the start: %s", error)


def admit_newcomer(run: RunDirectory, start: str, report: HealthReport) -> None:
    """Let a node in that joins a run under way.

    Raises:
        NodeRefused: it is sick beside those that have begun the run; an event tells.
    """
    with _told(run):
        require_health([report], read_health(run, start))


@contextlib.contextmanager
def _told(run: RunDirectory) -> Iterator[None]:
    """Tell of refused nodes in the events of the run."""
    try:
        yield
    except NodeRefused as error:
        with contextlib.closing(EventFile(run.events)) as events:
            for refusal in error.refused:
                reason = "; ".join(refusal.reasons)
                events.append("node_refused", node=refusal.node, reason=reason)
        raise
