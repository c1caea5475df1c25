"""Membership events: nodes tell each other about workers, through a bulletin in the store."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch.distributed import Store

from holdfast.elastic.generation import Identity, parse_identity
from holdfast.parallel.errors import MembershipError, shown
from holdfast.parallel.reading import MALFORMED, Count, Text, of_kind, parse_json

logger = logging.getLogger("holdfast.membership")

MembershipEventKind = Literal[
    "ended",
    "silent",
    "disturbed",
    "agreeing",
    "joining",
    "leaving",
    "waiting",
    "suspected",
    "examined",
]
_URGENT = ("ended", "silent", "disturbed")
_HOLE_S = 1.0
"""Seconds that a numbered event may take to arrive; its author may have died in between."""


@dataclass(frozen=True, slots=True)
class MembershipEvent:
    """An observation of one node about a worker, for all other nodes."""

    kind: MembershipEventKind
    """ended: its process is gone. silent: it has not been heard of. disturbed: it lives, cannot
    finish its step, and has come to agree. agreeing: it has come to agree after its step. joining:
    it waits to be admitted. leaving: it wants to hand its state over and leave. waiting: it has
    waited for `peers` too long. suspected: its agent is going to kill it, and looks at it first.
    examined: its agent has looked at it, and `cause` is the line of Python that it was in."""
    identity: Identity
    cause: Text
    """The cause, for a person."""
    age_s: float = 0.0
    """Seconds between the worker's last sign of life and this event, 0 if that is not known; for
    `leaving`, until it must have left."""
    node: Text = ""
    """The node that made the observation."""
    generation: Count = 0
    """The generation that the event is about; 0: any generation with this worker."""
    peers: str = ""
    """The ranks that a waiting worker waits for, as `format_identities` writes them."""
    evidence: Text = ""
    """The name of the file of evidence about a suspected or examined worker, in the folder of the
    run's incidents as `node` sees it."""

    @property
    def urgent(self) -> bool:
        """Whether the current step cannot be finished, so that the change must not wait."""
        return self.kind in _URGENT

    @property
    def calls(self) -> bool:
        """Whether other members ought to come to agree, as soon as they can."""
        return self.urgent or self.kind == "agreeing"

    @property
    def lost(self) -> bool:
        """Whether the worker takes no further part."""
        return self.kind in ("ended", "silent")


def event_to_data(event: MembershipEvent) -> dict[str, Any]:
    """The event as JSON values."""
    return {**asdict(event), "identity": str(event.identity)}


def event_from_data(plain: Mapping[str, Any]) -> MembershipEvent:
    """The event that `event_to_data` wrote.

    Raises:
        MembershipError: it is none.
    """
    try:
        identity = parse_identity(plain["identity"])
        return of_kind({**plain, "identity": identity}, MembershipEvent)
    except MALFORMED as error:
        raise MembershipError(f"a message is no event of a worker ({shown(error)})") from error


def _event_in(content: bytes) -> list[MembershipEvent]:
    """The event in a message; a message of any other content is logged and left out."""
    try:
        return [event_from_data(parse_json(content))]
    except (MembershipError, ValueError) as error:
        logger.warning("the bulletin has a message that is left out: %s", error)
        return []


class Bulletin:
    """The events of one generation, in the same order for every reader. Make one per thread."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        """Reading begins with the first event.

        Args:
            store: the rendezvous store, below the generation's prefix.
        """
        self.store = store
        """The store; a new client of it may take the place of one that lost its connection."""
        self._clock = clock
        self._read = 0
        self._hole_since: float | None = None

    def post(self, event: MembershipEvent) -> None:
        """Post an event for all nodes. Raises RuntimeError if the store is gone."""
        number = self.store.add("events", 1)
        self.store.set(f"event/{number}", json.dumps(event_to_data(event)))

    def read(self) -> list[MembershipEvent]:
        """The events since the last call. Raises RuntimeError if the store is gone.

        It polls and does not wait, because a wait of the store that times out logs a warning.
        """
        events: list[MembershipEvent] = []
        posted = self.store.add("events", 0)
        while self._read < posted:
            key = f"event/{self._read + 1}"
            if self.store.check([key]):
                events += _event_in(self.store.get(key))
            elif not self._is_hole():
                break
            self._hole_since = None
            self._read += 1
        return events

    def _is_hole(self) -> bool:
        """Whether the next event has been missing for so long that its author must have died."""
        now = self._clock()
        self._hole_since = self._hole_since or now
        return now - self._hole_since > _HOLE_S
