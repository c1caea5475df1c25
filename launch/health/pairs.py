"""Which nodes are joined to which in a round, and which end of a slow link is at fault. Pure.

In each round a node has one partner, so that all links are used at once and none twice, and in each
round another one (the circle method for tournaments). A node that is slow with every partner is at
fault itself; a link that is slow though both its ends are well with others is at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high, median_low

from holdfast.launch.health.report import LEAST_SHARE

MOST_TIMES = 3.0
"""The multiple of other links' latency above which one is sick."""
LATER_S = 0.001
"""A latency that is longer than that of others by less is not sick, whatever its multiple."""


@dataclass(frozen=True, slots=True)
class LinkRate:
    """What was measured between two nodes, by their numbers."""

    round: int
    nodes: tuple[int, int]
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class LinkVerdict:
    """What the rates of all links show."""

    nodes: dict[int, str]
    """By node that is at fault: why."""
    links: dict[tuple[int, int], str]
    """By slow link: why, with the node at fault where that is known."""


def partners(nodes: int, number: int) -> list[tuple[int, int]]:
    """The pairs of a round, the lower node first. With an odd number of nodes one is alone."""
    seats = nodes + nodes % 2
    turned = [0, *(1 + (seat + number) % (seats - 1) for seat in range(seats - 1))]
    pairs = [(turned[seat], turned[seats - 1 - seat]) for seat in range(seats // 2)]
    return sorted((min(a, b), max(a, b)) for a, b in pairs if max(a, b) < nodes)


def rounds_of(nodes: int, wanted: int) -> int:
    """How many rounds are made: as many as wanted, and at most one for each pair; 0: all.

    With an odd number of nodes each is alone once, and one round more gives all two partners.
    """
    most = nodes - 1 + nodes % 2 if nodes > 1 else 0
    asked = wanted + nodes % 2 if wanted else most
    return min(most, asked)


def verdict_of(rates: Sequence[LinkRate]) -> LinkVerdict:
    """The nodes and links at fault."""
    slow = {rate.nodes: reason for rate in rates if (reason := _slowness(rate, rates))}
    of_node: dict[int, list[LinkRate]] = {}
    for rate in rates:
        for node in rate.nodes:
            of_node.setdefault(node, []).append(rate)
    at_fault = {
        node: f"its links to {_told(node, own)} are slow: {slow[own[0].nodes]}"
        for node, own in of_node.items()
        if len(own) > 1 and all(rate.nodes in slow for rate in own)
    }
    links = {}
    for nodes, reason in slow.items():
        ends = [node for node in nodes if node in at_fault]
        alone = [node for node in nodes if len(of_node[node]) == 1]
        known = "" if ends or not alone else "; which end is at fault is not known"
        links[nodes] = f"{reason}{known}"
    return LinkVerdict(at_fault, links)


def _told(node: int, rates: Sequence[LinkRate]) -> str:
    """The partners of a node, by their numbers, for a person."""
    others = sorted(other for rate in rates for other in rate.nodes if other != node)
    return f"{'all of ' if len(others) > 1 else ''}nodes {', '.join(map(str, others))}"


def _slowness(rate: LinkRate, rates: Sequence[LinkRate]) -> str:
    """Why a link is slow beside links that share no end with it, or beside all; empty: it is not.

    A sick node would otherwise be held against itself.
    """
    others = [other for other in rates if other is not rate]
    apart = [other for other in others if not {*other.nodes} & {*rate.nodes}]
    peers = apart or others
    if not peers:
        return ""
    usual = median_high(other.bytes_per_s for other in peers)
    if rate.bytes_per_s < LEAST_SHARE * usual:
        return (
            f"{rate.bytes_per_s / 1e6:,.4g} MB/s, below {LEAST_SHARE:g} of the other links' "
            f"{usual / 1e6:,.4g}"
        )
    usual = median_low(other.latency_s for other in peers)
    if rate.latency_s > max(MOST_TIMES * usual, usual + LATER_S):
        return (
            f"{1e3 * rate.latency_s:,.3g} ms, above {MOST_TIMES:g} times the other links' "
            f"{1e3 * usual:,.3g}"
        )
    return ""
