"""The judgement of nodes by each other: a node is sick when it differs from its peers. Pure.

Rates of machines are known in advance by no rule, and a slow node is slow beside others. So limits
are shares of the peers' median; what must be equal is held against what most nodes have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median_high

import msgspec

from holdfast.launch.health.report import Check, HealthReport


def judged(
    reports: Sequence[HealthReport], others: Sequence[HealthReport] = ()
) -> list[HealthReport]:
    """The reports, with each value held against those of the other nodes.

    Args:
        others: reports of nodes that are in the run already: the others are held against these, and
            they are not judged again.
    """
    by_name = _by_name((*reports, *others))
    known = {report.node for report in others}
    return [
        msgspec.structs.replace(
            report,
            checks=tuple(_judged(c, report.node, by_name[c.name], known) for c in report.checks),
        )
        for report in reports
    ]


def _by_name(reports: Sequence[HealthReport]) -> dict[str, dict[str, float | str]]:
    """By check: the value of each node."""
    found: dict[str, dict[str, float | str]] = {}
    for report in reports:
        for check in report.checks:
            found.setdefault(check.name, {})[report.node] = check.value
    return found


def _judged(check: Check, node: str, values: Mapping[str, float | str], others: set[str]) -> Check:
    peers = {other: value for other, value in values.items() if other != node}
    if others:
        peers = {other: value for other, value in peers.items() if other in others}
    if not check.passed or not check.comparison or not peers:
        return check
    if check.comparison in ("equal", "told"):
        return _equal(check, list(peers.values()))
    numbers = [value for value in peers.values() if isinstance(value, (int, float))]
    if not numbers or isinstance(check.value, str):
        return check
    return _rate(check, check.value, numbers)


def _rate(check: Check, value: float, peers: Sequence[float]) -> Check:
    """A rate that must not be far below the median of the other nodes'.

    Of two medians the higher counts: where half of the nodes are slow, the others still show it.
    """
    usual = median_high(peers)
    limit = check.share * usual
    reason = check.reason
    if value < limit:
        usually = msgspec.structs.replace(check, value=usual).told
        reason = f"{check.told} is below {check.share:g} of the other nodes' {usually}"
    return msgspec.structs.replace(check, limit=limit, passed=value >= limit, reason=reason)


def _equal(check: Check, peers: Sequence[float | str]) -> Check:
    """A value that must be that of most nodes, this one counted.

    Where two values are equally frequent, it is unknown which is wrong, and all are.
    """
    counts = Counter([*peers, check.value])
    (usual, most), *others = counts.most_common(2)
    tied = bool(others) and others[0][1] == most
    if not tied and usual == check.value:
        return msgspec.structs.replace(check, limit=usual)
    theirs = sorted({str(value) for value in peers if value != check.value})
    reason = f"{check.told}, and other nodes have {', '.join(theirs)}"
    return msgspec.structs.replace(
        check,
        limit=None if tied else usual,
        passed=check.comparison == "told",
        reason=reason if theirs else check.reason,
    )
