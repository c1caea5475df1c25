"""Which rank hangs, told from who waits for whom. Pure.

A worker that waits for a message cannot tell a peer that hangs from one that itself waits for a third. All
waits together can: at the end of the chain is the rank that others wait for, and that waits for nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from holdfast.elastic.generation import Identity, parse_identities
from holdfast.elastic.membership_events import MembershipEvent

SETTLE_S = 1.0
"""How long further waits are collected after the first: all ranks soon wait behind one that hangs."""


@dataclass(frozen=True, slots=True)
class Wait:
    """One worker has waited for longer than is normal; what its record of operations says."""

    peers: frozenset[int]
    """The ranks that it waits for."""
    seconds: float
    operation: str
    """Which operation, and whether the peer never started or never finished it; for a person."""


def blame(waits: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """The ranks that hang, given for whom each waiting rank waits.

    Those that are waited for and do not wait. Where all wait in a circle (a lost message, or programs
    that do not fit together), the one that most wait for, so that the circle is broken.
    """
    waited_for = Counter(peer for peers in waits.values() for peer in peers)
    idle = frozenset(waited_for) - waits.keys()
    if idle or not waited_for:
        return idle
    most = max(waited_for.values())
    return frozenset([min(rank for rank, count in waited_for.items() if count == most)])


@dataclass(slots=True)
class HangJudge:
    """Collects the `waiting` events of one generation; equal on all agents. Not tied to a clock."""

    generation: int = 0
    _waits: dict[Identity, MembershipEvent] = field(default_factory=dict)
    _since_s: float | None = None

    def enter(self, generation: int) -> None:
        """A new generation: nobody waits in it yet."""
        self.generation, self._waits, self._since_s = generation, {}, None

    def hear(self, event: MembershipEvent, now_s: float) -> None:
        """Take in an event of kind `waiting`; of another generation it is passed over."""
        if event.generation == self.generation:
            self._waits[event.identity] = event
            self._since_s = now_s if self._since_s is None else self._since_s

    def has(self, identity: Identity) -> bool:
        """Whether this worker's wait is known."""
        return identity in self._waits

    def culprits(self, now_s: float) -> dict[int, str]:
        """The ranks that hang, and why each is held to, once all waits have had time to arrive."""
        if self._since_s is None or now_s - self._since_s < SETTLE_S:
            return {}
        waits = {
            identity.rank: frozenset(i.rank for i in parse_identities(event.peers))
            for identity, event in self._waits.items()
        }
        found: dict[int, str] = {}
        for rank in blame(waits):
            first = min(
                (n for i, n in self._waits.items() if rank in waits[i.rank]),
                key=lambda n: n.identity,
            )
            found[rank] = f"hung: rank {first.identity} {first.cause}"
        return found
