"""The coordination of a save: reports between ranks over the rendezvous store, with a deadline.

Nothing here is collective. A rank that is stuck does not report. It is then named with its phase,
and the save is given up. Training never waits for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch.distributed import PrefixStore, Store

from holdfast.checkpoint.saving.arena import Cancelled, Deadline
from holdfast.parallel.errors import CheckpointError, PeerLost
from holdfast.parallel.reading import decode_json

_FIRST_POLL_S = 0.0005
_LONGEST_POLL_S = 0.005
_POLL_PER_RANK_S = 2e-5
"""With many ranks each asks less often: together at most 50,000 times a second."""


@dataclass(frozen=True, slots=True)
class Members:
    """The ranks that save and load together, as one of them sees them."""

    rank: int
    nodes: tuple[int, ...]
    """The machine of each rank, as a number; the length is the number of ranks."""
    store: Store
    """The rendezvous store where they meet."""
    generation: int = 0
    """The generation of an elastic run that these ranks are."""
    coordinator: int = 0
    """The rank that makes the folder of a save and commits."""
    numbers: tuple[int, ...] = ()
    """The number that each rank has in its run, for messages and records; empty: its index here."""

    @property
    def size(self) -> int:
        return len(self.nodes)

    def number(self, rank: int) -> int:
        """The number that a rank has in its run, for messages and records."""
        return self.numbers[rank] if self.numbers else rank

    @property
    def neighbours(self) -> list[int]:
        """The ranks of this rank's node, itself included, in ascending order."""
        return [rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank]]

    def with_own_connection(self) -> Members:
        """The same members for another thread, with an own connection where that is possible."""
        try:
            return replace(self, store=self.store.clone())  # pyrefly: ignore
        except (RuntimeError, NotImplementedError, PeerLost):
            return self


def numbered(machines: Sequence[str]) -> tuple[int, ...]:
    """The number of each rank's machine, by which ranks that share memory are `Members.nodes`."""
    numbers = {machine: number for number, machine in enumerate(dict.fromkeys(machines))}
    return tuple(numbers[machine] for machine in machines)


class Coordination:
    """The reports of the ranks of one save, as keys of the store. Every call is local."""

    def __init__(self, members: Members, name: str) -> None:
        """Begin to coordinate one save.

        Args:
            members: the ranks, with a connection that belongs to this thread.
            name: the name of the save, never used before.
        """
        self.name, self.phase = name, ""
        self.use(members)

    def use(self, members: Members) -> None:
        """Take another connection to the same members."""
        self.members = members
        self._store = PrefixStore(f"checkpoint/{self.name}", members.store)

    @property
    def rank(self) -> int:
        return self.members.rank

    @property
    def size(self) -> int:
        return self.members.size

    @property
    def ranks(self) -> range:
        return range(self.size)

    @property
    def coordinator(self) -> int:
        """The rank that makes the folder and commits."""
        return self.members.coordinator

    @property
    def is_coordinator(self) -> bool:
        return self.rank == self.coordinator

    def enter(self, phase: str) -> None:
        """Set the phase of this rank, for the message if the rank gets stuck in it."""
        self.phase = phase
        self._store.set(f"phase/{self.rank}", phase)

    def report(self, kind: str, content: dict[str, Any]) -> None:
        """Publish this rank's report of a `kind`."""
        self._store.set(f"{kind}/{self.rank}", msgspec.json.encode(content).decode())

    def report_failure(self, reason: str) -> None:
        """Tell the others that this rank cannot go on; the first reason counts."""
        self._store.compare_set("failed", "", self.said(reason))

    def said(self, reason: str) -> str:
        """A reason with this rank and its phase before it."""
        return f"rank {self.members.number(self.rank)}, {self.phase}: {reason}"

    def collect(
        self,
        kind: str,
        ranks: Sequence[int],
        deadline: Deadline,
        content: Any = dict[str, Any],
        *,
        patience_s: float = 0.0,
    ) -> dict[int, Any]:
        """Wait for the reports of a `kind` from `ranks`. Returns them by rank.

        Args:
            kind: "begin", "written", "header" or "end".
            deadline: the deadline of the save; a wait lasts no longer.
            content: the type of the reports.
            patience_s: the time to wait beyond the deadline, so that the coordinator can name the
                late rank.
        Raises:
            CheckpointError: a rank failed, or did not report in time; it is named with its phase.
                Or its report is of another type.
            Cancelled: the save was given up on this rank meanwhile.
        """
        keys = {rank: f"{kind}/{rank}" for rank in ranks}
        if not keys:  # torch's store, when it logs what it does, crashes if asked for no keys
            return {}
        pause = _FIRST_POLL_S
        while not self._store.check(list(keys.values())):
            self._raise_failure()
            if deadline.cancelled:
                raise Cancelled
            if deadline.is_over(patience_s):
                raise CheckpointError(self._missing(keys))
            deadline.pause(pause)
            pause = min(2 * pause, max(_LONGEST_POLL_S, _POLL_PER_RANK_S * len(self.ranks)))
        found = self._store.multi_get(list(keys.values()))
        reports: dict[int, Any] = {}
        for rank, text in zip(keys, found, strict=True):
            try:
                reports[rank] = decode_json(text, content)
            except ValueError as error:
                raise CheckpointError(
                    f"rank {self.members.number(rank)} reports in an unknown way ({error}); run "
                    "the same version of holdfast everywhere"
                ) from error
        return reports

    def connected_again(self, reason: str) -> Members:
        """The members for further saves, after this one has failed here.

        The connection may be what failed, so there is a new one, by which the others hear of it.

        Args:
            reason: why it failed, with this rank and its phase.
        """
        self.use(self.members.with_own_connection())
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("failed", "", reason)
        return self.members

    def clear(self) -> None:
        """Remove this rank's keys, once no rank waits for them."""
        for kind in ("phase", "begin", "written", "header", "end"):
            self._store.delete_key(f"{kind}/{self.rank}")
        if self.is_coordinator:
            self._store.delete_key("failed")

    def failure(self) -> str:
        """The reason why this save has failed on some rank; empty while none has reported one."""
        return self._store.get("failed").decode() if self._store.check(["failed"]) else ""

    def _raise_failure(self) -> None:
        reason = self.failure()
        if reason:
            raise CheckpointError(reason)

    def _missing(self, keys: dict[int, str]) -> str:
        missing = [rank for rank, key in keys.items() if not self._store.check([key])]
        number = self.members.number
        phases = [f"rank {number(rank)} ({self._phase_of(rank)})" for rank in missing[:4]]
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return f"no word in time from {', '.join(phases)}{more}"

    def _phase_of(self, rank: int) -> str:
        if not self._store.check([f"phase/{rank}"]):
            return "has not begun"
        return self._store.get(f"phase/{rank}").decode()
