"""What was found about the health of a node, as values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from holdfast.parallel.errors import counted
from holdfast.parallel.reading import Text

LEAST_SHARE: Final = 0.7
"""The share of the other nodes' median below which a rate is sick, where nothing else is said."""
Comparison = Literal["", "least", "equal", "told"]
"""How a value is compared with those of the other nodes. "": not at all. "least": it must not be
far below theirs. "equal": it must be theirs. "told": a difference is told,
and fails no node."""


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at on one node."""

    name: Text
    """What was looked at, the device or folder included; equal on all nodes."""
    value: float | Text
    """What was found: a number in `unit`, or a text."""
    unit: Text = ""
    comparison: Comparison = ""
    share: float = LEAST_SHARE
    """With "least": the share of the other nodes' median that the value must reach."""
    limit: float | Text | None = None
    """What the value must reach, must not exceed, or must be; None: there is nothing to compare
    with."""
    passed: bool = True
    reason: Text = ""
    """Why it has not passed, or what a person should know although it has."""

    @property
    def told(self) -> str:
        """The value with its unit, for a person."""
        return _told(self.value, self.unit)

    @property
    def told_limit(self) -> str:
        """The limit with its unit, for a person; empty without one."""
        return "" if self.limit is None else _told(self.limit, self.unit)


def failed(name: str, value: float | str, unit: str, reason: str) -> Check:
    """A check that the node alone has shown not to pass."""
    return Check(name, value, unit, passed=False, reason=reason)


class HealthReport(msgspec.Struct, frozen=True):
    """All that was looked at on one node."""

    node: Text
    checks: Annotated[tuple[Check, ...], Meta(max_length=10_000)] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the node is sick, one line for each check that has not passed."""
        return tuple(f"{c.name}: {c.reason}" for c in self.checks if not c.passed)


class LinkCheck(msgspec.Struct, frozen=True):
    """What a link between two nodes carries, at a time at which each node used one link."""

    round: int
    nodes: tuple[Text, Text]
    bytes_per_s: float
    """In the slower direction."""
    latency_s: float
    """Half of the shortest round trip."""
    passed: bool = True
    reason: Text = ""


class JobReport(msgspec.Struct, frozen=True):
    """All that was looked at on the nodes of a job, and between them."""

    nodes: tuple[HealthReport, ...]
    links: tuple[LinkCheck, ...] = ()

    @property
    def passed(self) -> bool:
        return all(node.passed for node in self.nodes) and all(link.passed for link in self.links)

    def to_json(self) -> bytes:
        """All of it, with the answer."""
        nodes = [{**msgspec.to_builtins(node), "passed": node.passed} for node in self.nodes]
        found = {"passed": self.passed, "nodes": nodes, "links": self.links}
        return msgspec.json.encode(found)

    def verdict(self) -> list[str]:
        """What is wrong, one line each; or one line that nothing is."""
        lines = [f"{node.node}: {line}" for node in self.nodes for line in node.failures]
        lines += [f"link {' - '.join(link.nodes)}: {link.reason}" for link in self._slow()]
        return lines or [f"{counted(len(self.nodes), 'node')}: nothing is wrong"]

    def _slow(self) -> Iterable[LinkCheck]:
        return (link for link in self.links if not link.passed)


def _told(value: float | str, unit: str) -> str:
    if isinstance(value, str):
        return value
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{number} {unit}".rstrip()


def rows_of(reports: Sequence[HealthReport]) -> list[tuple[str, str, str, str, str]]:
    """The rows of a table for a person: node, check, value, limit, and what is wrong."""
    return [
        (report.node, check.name, check.told, check.told_limit, _word(check))
        for report in reports
        for check in report.checks
    ]


def _word(check: Check) -> str:
    if not check.passed:
        return f"FAILED: {check.reason}"
    return f"ok; {check.reason}" if check.reason else "ok"
