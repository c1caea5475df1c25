"""The roll of a run's agents: a folder that all nodes see, with a file for each agent.

An agent holds a lock on its file for as long as it lives; the kernel gives the lock up when the
process ends, however it ends. So the folder tells of every agent that has ever had workers in this
start of the run, and whether it lives. The end of the run is written there too, for nodes that were
cut off when it came.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated

from msgspec import Meta

from holdfast.elastic.agreement import AcceptorFile, Report
from holdfast.elastic.generation import Generation, Identity, format_identities
from holdfast.elastic.proxy import report_on_behalf_of
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.parallel.files import create_file, open_lock
from holdfast.parallel.reading import decode_json, open_descriptor, read_regular

logger = logging.getLogger("holdfast.membership")

_LOCK = ".agent"
_END = "end.json"
_MOST_BYTES = 1 << 20
_ANSWER_S = 0.5
_LOOK_S = 1.0
"""The interval at which a side without a majority looks whether the others are dead."""


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The end of a run, or of one node's part in it."""

    code: Annotated[int, Meta(ge=0, le=255)]
    """The exit code of every node; 0: the run has reached its last step."""
    reason: str = ""
    """The reason of another end, for a person."""


class Roll:
    """The roll in one folder. Local; every call may wait for the disk that holds it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sign(self, address: str) -> IO[str]:
        """Enter an agent, before it starts workers, by the address of its rendezvous store.

        Returns:
            The locked file, to be kept open while the agent lives.
        Raises:
            OSError: the file cannot be made or locked.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(open_lock(self._folder / f"{address}{_LOCK}"), "r+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        return file

    def end(self, end: RunEnd) -> None:
        """Write how the run ended; the first word stands. A disk without room keeps it out."""
        if self.ended() is None:
            partial = self._folder / f".{os.getpid()}.partial"
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                with create_file(partial) as file:
                    file.write(json.dumps(asdict(end)).encode())
                partial.replace(self._folder / _END)

    def ended(self) -> RunEnd | None:
        """How the run ended; None: nothing is written."""
        try:
            return decode_json(read_regular(self._folder / _END, _MOST_BYTES), RunEnd)
        except (OSError, ValueError):
            return None

    def dead(
        self, members: Collection[str], present: Collection[str]
    ) -> contextlib.ExitStack | None:
        """Prove that every agent that is not present has ended, and all its workers with it.

        An agent has ended if nothing listens at its address and its lock is free. Silence proves
        nothing, and neither does a refusal alone, which a firewall may send.

        Args:
            members: the addresses of the agents of the last generation, present or not.
            present: the addresses of the agents whose workers take part here.
        Returns:
            The locks, to be kept until the others have gone on; None if one may live.
        """
        try:
            signed = {path.name.removesuffix(_LOCK) for path in self._folder.glob(f"*{_LOCK}")}
        except OSError:
            return None
        if not signed >= set(members):
            return None
        with contextlib.ExitStack() as held:
            for address in sorted(signed - set(present)):
                if not (nothing_listens(address) and self._take(address, held)):
                    return None
            return held.pop_all()
        return None

    def _take(self, address: str, held: contextlib.ExitStack) -> bool:
        try:
            opened = open_descriptor(self._folder / f"{address}{_LOCK}", os.O_RDWR, follow=False)
            file = held.enter_context(os.fdopen(opened, "r+"))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def nothing_listens(address: str) -> bool:
    """Whether the host of HOST:PORT answers that no program listens there. Waits 0.5 s at most."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
    except ValueError:
        return False
    return False


class DeadNodes:
    """Reports for workers of nodes that are proved dead, so that a side is not held up by them.

    The proof (see `Roll.dead`) holds for all nodes that do not take part, or for none: while any
    agent of the run may live, it may have gone on with others, and then a side without a majority
    must wait. If every other agent is dead, then no living process knows of a membership that this
    side has not accepted, and reports with a new acceptor state cannot lead to a second one.
    """

    def __init__(self, spec: WorkerSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec, self._clock = spec, clock
        self._roll = Roll(Path(spec.settings.roll)) if spec.settings.roll else None
        self._look_at_s: float | None = None
        self._held = contextlib.ExitStack()
        self._stop = threading.Event()

    def look(self, generation: Generation | None, reports: Mapping[Identity, Report]) -> None:
        """Report for the absent members of a generation if the proof holds.

        One worker of the side does it: the lowest that is a member and takes part.

        Args:
            generation: the last generation of this worker; None: it was in none.
            reports: the reports of the newest round, in which there was no majority.
        """
        now_s = self._clock()
        if self._look_at_s is None:
            self._look_at_s = now_s + _LOOK_S
        if self._roll is None or generation is None or now_s < self._look_at_s:
            return
        self._look_at_s = now_s + _LOOK_S
        if any(r.acceptor.generation > generation.number for r in reports.values()):
            return
        if self._spec.identity != min(
            (i for i in generation.identities if i in reports and reports[i].alive), default=None
        ):
            return
        stores = {member.identity: member.store for member in generation.members}
        present = {store for identity, store in stores.items() if identity in reports}
        present |= {report.store for report in reports.values() if report.alive}
        proof = self._roll.dead(set(stores.values()), present)
        if proof is None:
            return
        self._held.enter_context(proof)
        self._look_at_s = float("inf")  # to open the files again would give the locks up
        dead = [i for i in sorted(stores) if i not in reports and stores[i] not in present]
        logger.warning(
            "rank %s: the agents of ranks %s are dead: nothing listens at their addresses, and "
            "their locks are free; the others go on without these ranks",
            self._spec.identity,
            format_identities(dead),
        )
        for identity in dead:
            threading.Thread(
                target=report_on_behalf_of,
                args=(
                    identity,
                    self._spec.settings,
                    AcceptorFile(Path(self._spec.folder), identity),
                    self._stop,
                ),
                kwargs={"data": {"cause": "its agent is dead"}},
                name=f"holdfast-proxy-{identity}",
                daemon=True,
            ).start()

    def close(self) -> None:
        """End the reports, and give the locks of the proof up. Called once there is agreement."""
        self._stop.set()
        self._stop = threading.Event()
        self._held.close()
        self._look_at_s = None
