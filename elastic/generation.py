"""The participants of a run: identities, members, and their generation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from holdfast.parallel.errors import MembershipError, shown
from holdfast.parallel.reading import Count, of_kind

_IDENTITY = re.compile(r"(\d{1,9})(?:\.(\d{1,9}))?", re.ASCII)
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})", re.ASCII)
_MOST = 1 << 20
"""The most identities that a text may stand for, far above what a run has."""


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """One worker process: its rank, and its incarnation. Never used twice."""

    rank: int
    incarnation: int = 0
    """0 for the worker that the run began with; a replacement has a higher number."""

    def __str__(self) -> str:
        return f"{self.rank}.{self.incarnation}" if self.incarnation else str(self.rank)


def parse_identity(text: str) -> Identity:
    """The identity in a text of `str`: `3`, or `3.2` for a replacement.

    Raises:
        MembershipError: the text is not an identity.
    """
    found = _IDENTITY.fullmatch(text)
    if found is None:
        raise MembershipError(
            f"{shown(text)} is not the identity of a worker (RANK or RANK.INCARNATION)"
        )
    return Identity(int(found[1]), int(found[2] or 0))


def format_identities(identities: Iterable[Identity]) -> str:
    """A set of identities in one line: `0-3,4.1,5-7`. Only replacements make it longer."""
    parts: list[str] = []
    first: int | None = None
    ordered = sorted(set(identities))
    for number, identity in enumerate(ordered):
        if identity.incarnation:
            parts.append(str(identity))
            continue
        first = identity.rank if first is None else first
        following = ordered[number + 1] if number + 1 < len(ordered) else None
        if following != Identity(identity.rank + 1):
            parts.append(str(first) if first == identity.rank else f"{first}-{identity.rank}")
            first = None
    return ",".join(parts)


def parse_identities(text: str) -> frozenset[Identity]:
    """The set in a text of `format_identities`.

    Raises:
        MembershipError: the text is not a set of identities, or one of more than a million.
    """
    identities: set[Identity] = set()
    left = _MOST
    for part in text.split(",") if text else ():
        found = _RANGE.fullmatch(part)
        ranks = range(int(found[1]), int(found[2]) + 1) if found else None
        left -= 1 if ranks is None else len(ranks)
        if left < 0:
            raise MembershipError(f"{shown(text)} stands for more than {_MOST:,} workers")
        if ranks is None:
            identities.add(parse_identity(part))
        else:
            identities.update(map(Identity, ranks))
    return frozenset(identities)


@dataclass(frozen=True, slots=True)
class Member:
    """The report of one member when its generation was agreed on."""

    identity: Identity
    node: str
    """Its agent's name, which no other agent of the run has."""
    store: str
    """The rendezvous store of its node's agent, HOST:PORT."""
    held: int
    """The generation of its training state; 0: none, because it has just been started."""
    step: int
    """The number of steps that it has committed."""
    phase: str
    """The phase of the step in which it came to agree; the caller's own word."""
    leaving: bool
    """Whether it is leaving: its state moves to others, and it gets none."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Other values that the caller reported, as JSON values."""
    machine: str = ""
    """The identity of the machine on which it runs."""

    @property
    def rank(self) -> int:
        return self.identity.rank

    @property
    def fields(self) -> tuple[Any, ...]:
        """All values, as JSON values."""
        named = (self.held, self.step, self.phase, self.leaving)
        where = (self.node, self.machine, self.store)
        return str(self.identity), *where, *named, self.data


@dataclass(frozen=True, slots=True)
class _Fields:
    """A generation in a message, whose members are taken apart after it."""

    number: Count
    members: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Generation:
    """A set of ranks that train together; equal on every member."""

    number: int
    """A number that grows with each agreement and never goes back."""
    members: tuple[Member, ...]
    """The members by rank."""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(member.rank for member in self.members)

    @property
    def identities(self) -> frozenset[Identity]:
        return frozenset(member.identity for member in self.members)

    @property
    def store(self) -> str:
        """The address of this generation's rendezvous store, HOST:PORT.

        It is the agent's store of the lowest rank that holds state and stays, or else of the lowest
        rank.
        """
        ordered = sorted(self.members, key=lambda m: (m.leaving, not m.held, m.rank))
        return ordered[0].store

    @property
    def prefix(self) -> str:
        """The prefix of this generation's keys in its store.

        It has a digest of the whole value, so that members that disagreed would not meet.
        """
        fields = [member.fields for member in self.members]
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return f"generation-{self.number}-{digest[:8]}"

    @property
    def failure_domains(self) -> dict[int, str]:
        """What each rank is lost with: its machine, or its node if all are on one machine."""
        several = len({member.machine for member in self.members}) > 1
        return {m.rank: m.machine if several else m.node for m in self.members}

    def member(self, rank: int) -> Member:
        """The member with a rank. Raises KeyError if there is none."""
        for member in self.members:
            if member.rank == rank:
                return member
        raise KeyError(rank)

    def to_data(self) -> dict[str, Any]:
        """The generation as JSON values."""
        members = [{**asdict(m), "identity": str(m.identity)} for m in self.members]
        return {"number": self.number, "members": members}

    def lost_since(self, before: Generation | None) -> tuple[Identity, ...]:
        """The members of an earlier generation that are not in this one."""
        known = before.identities if before is not None else frozenset()
        return tuple(sorted(known - self.identities))

    def joined_since(self, before: Generation | None) -> tuple[Identity, ...]:
        """The members that an earlier generation did not have."""
        known = before.identities if before is not None else frozenset()
        return tuple(sorted(self.identities - known))


def generation_from_data(plain: Mapping[str, Any]) -> Generation:
    """The generation that `Generation.to_data` wrote.

    Raises:
        ValueError, TypeError, KeyError, MembershipError: it is none.
    """
    found = of_kind(dict(plain), _Fields)
    members = tuple(
        of_kind({**member, "identity": parse_identity(member["identity"])}, Member)
        for member in found.members
    )
    return Generation(found.number, members)
