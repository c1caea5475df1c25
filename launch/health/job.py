"""The health of all nodes of a job, and of the links between them.

The processes that a launcher has started meet at its rendezvous store. The first process of each
node looks at the node; the others wait for the answer.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median_low
from typing import TYPE_CHECKING, TypeVar

import msgspec

from holdfast.launch.health.judgement import judged
from holdfast.launch.health.links import LinkClient, LinkServer
from holdfast.launch.health.node import NodeSettings, check_node
from holdfast.launch.health.pairs import LinkRate, partners, rounds_of, verdict_of
from holdfast.launch.health.report import Check, HealthReport, JobReport, LinkCheck, failed
from holdfast.parallel.comm import own_address_towards
from holdfast.parallel.errors import PeerLost, first_line
from holdfast.parallel.reading import decode_json
from holdfast.trainer.worlds import WorldInfo

if TYPE_CHECKING:
    from torch.distributed import Store

MOST_OFFSET_S = 1.0
"""The offset of two nodes' clocks beyond which records of a run have no order."""
_FAREWELL_S = 20.0
_T = TypeVar("_T")


class Place(msgspec.Struct, frozen=True):
    """A process of the job."""

    is_first: bool
    """Whether it is the first one of its node."""


class Rate(msgspec.Struct, frozen=True):
    """What a node has measured in a round."""

    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    error: str = ""


class Offset(msgspec.Struct, frozen=True):
    """How far a node's clock is from the first node's."""

    seconds: float = 0.0
    error: str = ""


class Meeting:
    """What the processes of a job tell each other over their store. Collective calls, in order."""

    def __init__(self, store: Store, members: Sequence[int], own: int) -> None:
        """Nothing is told yet.

        Args:
            members: the ranks that take part.
            own: this process's rank, one of these.
        """
        self._store, self._members, self._own = store, members, own

    def collect(self, what: str, value: _T, kind: type[_T]) -> list[_T]:
        """The values of all members in their order, on the first of them; on others nothing.

        Raises:
            PeerLost: a member has not told its own in time.
        """
        self._store.set(f"{what}/{self._own}", msgspec.json.encode(value).decode())
        if self._own != self._members[0]:
            return []
        return [decode_json(self._get(f"{what}/{n}", n, what), kind) for n in self._members]

    def tell(self, what: str, value: _T, kind: type[_T]) -> _T:
        """The value of the first member.

        Raises:
            PeerLost: it has not told it in time.
        """
        first = self._members[0]
        if self._own == first:
            self._store.set(what, msgspec.json.encode(value).decode())
            return value
        return decode_json(self._get(what, first, what), kind)

    def gather(self, what: str, value: _T, kind: type[_T]) -> list[_T]:
        """The values of all members, in their order.

        Raises:
            PeerLost: a member has not told its own in time.
        """
        found = self.collect(what, value, kind)
        return self.tell(f"all {what}", found, list[kind])  # pyrefly: ignore

    def wait(self, what: str) -> None:
        """Return once all members have come here.

        Raises:
            PeerLost: one has not come in time.
        """
        self.collect(what, self._own, int)
        self.tell(f"all {what}", True, bool)

    def _get(self, key: str, rank: int, what: str) -> bytes:
        try:
            return self._store.get(key)
        except RuntimeError as error:
            raise PeerLost(
                f"rank {rank} of this job has not told its {what}: {first_line(error)}; see its log"
            ) from error

    def leave(self, everyone: int) -> None:
        """Wait, as the host of the store, until so many have read all that they need."""
        self._store.add("left", 1)
        deadline_s = time.monotonic() + _FAREWELL_S
        while self._store.add("left", 0) < everyone and time.monotonic() < deadline_s:
            time.sleep(0.05)


def check_job(
    world: WorldInfo, settings: NodeSettings, rounds: int
) -> tuple[bool, JobReport | None]:
    """Look at all nodes of a job. Collective over its processes.

    Args:
        rounds: the number of partners with which each node measures its links; 0: all others.
    Returns:
        Whether all is well, on each process; on rank 0 what was found.
    Raises:
        PeerLost: a process has not come, or is gone.
    """
    from torch.distributed import PrefixStore

    from holdfast.trainer import connect, meet

    store = PrefixStore(f"health-{world.attempt}", connect(world))
    meet(store, world)
    everyone = Meeting(store, range(world.world_size), world.rank)
    places = everyone.gather("place", Place(world.local_rank == 0), Place)
    firsts = [rank for rank, place in enumerate(places) if place.is_first]
    report = None
    if world.rank in firsts:
        named = settings.name or f"{socket.gethostname()}-{world.rank}"
        meeting = Meeting(PrefixStore("nodes", store), firsts, world.rank)
        report = _of_nodes(meeting, world, replace(settings, name=named), firsts, rounds)
    is_well = everyone.tell("answer", report is not None and report.passed, bool)
    if world.rank == 0:
        everyone.leave(world.world_size)
    else:
        store.add("left", 1)
    return is_well, report


def _of_nodes(
    meeting: Meeting, world: WorldInfo, settings: NodeSettings, firsts: Sequence[int], rounds: int
) -> JobReport | None:
    """All reports, judged by each other, and the links, on the first node.

    Collective over the nodes.
    """
    own = firsts.index(world.rank)
    report = check_node(settings)
    host = own_address_towards(world.store_host, world.store_port) if len(firsts) > 1 else ""
    with LinkServer(host or "127.0.0.1") as server:
        addresses = meeting.gather("address", server.address, str)
        offsets = meeting.collect("offset", _offset(addresses[0] if own else ""), Offset)
        rates: list[LinkRate] = []
        for number in range(rounds_of(len(firsts), rounds)):
            pairs = partners(len(firsts), number)
            other = next((b for a, b in pairs if a == own), None)
            meeting.wait(f"begin-{number}")
            found = Rate() if other is None else _measured(addresses[other])
            if told := meeting.collect(f"rate-{number}", found, Rate):
                rates += [LinkRate(number, p, *_rate_of(told[p[0]])) for p in pairs]
        meeting.wait("end")  # until then others may measure towards this node
    reports = meeting.collect("report", report, HealthReport)
    return job_report(judged(reports), rates, offsets) if own == 0 else None


def job_report(
    reports: Sequence[HealthReport], rates: Sequence[LinkRate], offsets: Sequence[Offset]
) -> JobReport:
    """The report on a job: what links show of nodes stands among the nodes' own checks. Pure."""
    clocks = clock_checks(offsets)
    verdict = verdict_of(rates)
    nodes = []
    for number, report in enumerate(reports):
        checks = (*report.checks, clocks[number])
        if rates:
            own = [rate for rate in rates if number in rate.nodes]
            slowest = min((rate.bytes_per_s for rate in own), default=0.0) / 1e6
            reason = verdict.nodes.get(number, "")
            link = Check("links of the node", slowest, "MB/s", passed=not reason, reason=reason)
            checks = (*checks, link)
        nodes.append(msgspec.structs.replace(report, checks=checks))
    links = [
        LinkCheck(
            rate.round,
            (reports[rate.nodes[0]].node, reports[rate.nodes[1]].node),
            rate.bytes_per_s,
            rate.latency_s,
            rate.nodes not in verdict.links,
            verdict.links.get(rate.nodes, ""),
        )
        for rate in rates
    ]
    return JobReport(tuple(nodes), tuple(links))


def _measured(address: str) -> Rate:
    try:
        with LinkClient(address) as client:
            found = client.measure()
    except (OSError, EOFError) as error:
        return Rate(error=first_line(error))
    return Rate(found.bytes_per_s, found.latency_s)


def _rate_of(rate: Rate) -> tuple[float, float]:
    """Rate and latency; a link that cannot be used carries nothing."""
    return (0.0, float("1e9")) if rate.error else (rate.bytes_per_s, rate.latency_s)


def _offset(first: str) -> Offset:
    """The offset of this node's clock from the first node's.

    Args:
        first: the address of the first node; empty on that node.
    """
    if not first:
        return Offset()
    try:
        with LinkClient(first) as client:
            return Offset(-client.clock()[0])
    except (OSError, EOFError) as error:
        return Offset(error=first_line(error))


def clock_checks(offsets: Sequence[Offset]) -> list[Check]:
    """The checks of all nodes' clocks, from their offsets from one of them. Pure.

    They are held against the median, so that a wrong clock of that one is its own fault.
    """
    name = "clock of the node"
    usual_s = median_low([offset.seconds for offset in offsets if not offset.error])
    checks = []
    for offset in offsets:
        off_s = offset.seconds - usual_s
        if offset.error:
            told = f"the first node cannot be reached: {offset.error}"
            checks.append(failed(name, 0.0, "s", told))
        elif abs(off_s) > MOST_OFFSET_S:
            told = f"{off_s:+.3f} s beside the other nodes'; synchronise the clocks (NTP)"
            checks.append(failed(name, off_s, "s", told))
        else:
            checks.append(Check(name, off_s, "s", limit=MOST_OFFSET_S))
    return checks
