"""The terms of an elastic run: its first ranks agree on them, and newcomers are held to them.

The first ranks compare theirs before they are connected, and the lowest of them writes them to
RUN/terms.json. A newcomer compares its own with that file before it asks to take part, so that
refusing it costs the run nothing.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial

import msgspec
from torch.distributed import Store

from holdfast.elastic import Generation, WorkerSpec
from holdfast.parallel.errors import MembershipError
from holdfast.parallel.output import DiskWord, Waiting, WholeFiles
from holdfast.parallel.reading import decode_json, read_regular
from holdfast.trainer.elastic.interruption import Interruption
from holdfast.trainer.run import REMOVED, RunDirectory
from holdfast.trainer.terms import Terms, TermsDiffer, judge, require_equal_terms

logger = logging.getLogger("holdfast.elastic")

_MOST_BYTES = 1 << 20
_LIMIT_S = 60.0
"""Seconds that a newcomer waits for the terms of a run that has just begun."""
_PAUSE_S = 0.1


class WrittenTerms(msgspec.Struct, frozen=True):
    """The content of terms.json."""

    start: str
    """The name of the start of the run to which they belong."""
    rank: int
    """The rank that wrote them."""
    terms: Terms


class RunTerms:
    """This worker's terms, and the run's."""

    def __init__(
        self,
        own: Callable[[], Terms],
        spec: WorkerSpec,
        run: RunDirectory,
        interruption: Interruption,
        tell: Callable[[str], None],
    ) -> None:
        """Nothing is compared yet.

        Args:
            own: returns this worker's terms; called once.
            tell: tells a person a line.
        """
        self._make, self._spec, self._run = own, spec, run
        self._interruption, self._tell = interruption, tell
        self._made: Terms | None = None

    def require_admission(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Check that this newcomer trains with what the run trains with.

        Raises:
            TermsDiffer: it does not.
            MembershipError: the run has not told its terms.
        """
        waiting = Waiting(f"{self._run.terms}", _LIMIT_S, tell=logger.info, clock=clock)
        while (written := self._written()) is None:
            if waiting.left_s() <= 0:
                raise MembershipError(
                    f"{self._run.terms}, which the run's first ranks write, is not there or "
                    "belongs to an earlier start; this rank cannot know whether it trains with the "
                    "same as they do"
                )
            sleep(_PAUSE_S)
        own = _told(self._own(), written.terms)
        if own == written.terms:
            return
        # As ranks the two would have one number if this one replaces the writer.
        verdict = judge({0: written.terms, 1: own}, names=("the run", "this newcomer"))
        for note in verdict.notes:
            logger.warning("%s", note)
        if verdict.refused:
            raise TermsDiffer("; ".join(verdict.refused))

    def compare(self, generation: Generation, store: Store) -> None:
        """Compare the terms of the first ranks of the run. Collective over a generation.

        Raises:
            TermsDiffer: they differ, or one of them cannot train.
            PeerLost: the generation has ended.
        """
        rank, first = self._spec.rank, generation.ranks[0]
        notes = require_equal_terms(
            self._own, rank, generation.ranks, store, check=self._interruption.check
        )
        for note in notes:
            logger.warning("%s", note)
            if rank == first:
                self._tell(f"note: {note}")
        if rank == first:
            self._keep()

    def _keep(self) -> None:
        """Write the run's terms where newcomers read them, later if the disk refuses."""
        content = WrittenTerms(self._spec.settings.run, self._spec.rank, self._own())
        files = WholeFiles(self._run.root, DiskWord(self._tell))
        files.put(self._run.terms, msgspec.json.encode(content) + b"\n")
        if files.wait:
            again = partial(files.flush, math.inf)
            threading.Thread(target=again, name="holdfast-terms", daemon=True).start()

    def _own(self) -> Terms:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _written(self) -> WrittenTerms | None:
        """The terms of this start of the run; None: they are not there."""
        try:
            found = decode_json(read_regular(self._run.terms, _MOST_BYTES), WrittenTerms)
        except (OSError, ValueError):
            return None
        return found if found.start == self._spec.settings.run else None


def _told(own: Terms, of_run: Terms) -> Terms:
    """A newcomer's terms with what the ranks with state tell it: the samples that are removed."""
    config = own.config | {key: of_run.config[key] for key in (REMOVED,) if key in of_run.config}
    return msgspec.structs.replace(own, config=config)
