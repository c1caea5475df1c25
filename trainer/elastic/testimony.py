"""What a worker tells of itself when its agent asks: its stacks, and its GPU if it is to be killed.

It is told in the thread of the channel, so it works while the interpreter runs, whatever the main
thread does. Local.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from holdfast.elastic import WorkerSpec
from holdfast.parallel.comm import collectives_record, read_record
from holdfast.parallel.output import Evidence, own_threads, write_evidence
from holdfast.trainer.reports import device_facts, keep_failure

logger = logging.getLogger("holdfast.elastic")

_UNFINISHED = "it has not told of its GPU"


def testifying(spec: WorkerSpec) -> Callable[[bool], None]:
    """A function that writes the testimony of this worker, given whether to tell all there is.

    A rank that only waits is not asked about its GPU: the question may have to wait for a lock.
    """

    def testify(fully: bool) -> None:
        evidence = Evidence(
            role="hung" if fully else "waiting",
            rank=spec.rank,
            incarnation=spec.incarnation,
            pid=os.getpid(),
            stacks=own_threads(),
            notes=(_UNFINISHED,) if fully else (),
        )
        try:
            write_evidence(spec.testimony, evidence)
            if fully:
                whole = msgspec.structs.replace(
                    evidence, device=device_facts(), collectives=collectives_record(), notes=()
                )
                write_evidence(spec.testimony, whole)
        except (OSError, RuntimeError) as error:
            logger.warning("the agent has asked for evidence, and it cannot be told: %s", error)

    return testify


def leave_failure(error: BaseException, spec: WorkerSpec, incidents: Path) -> None:
    """Leave the evidence of an error that ends this worker to its agent. Raises nothing.

    Args:
        incidents: the folder of the run's incidents.
    """
    record = None
    with contextlib.suppress(OSError, ValueError):
        record = read_record(spec.flight_record)
    incarnation = spec.incarnation
    keep_failure(error, spec.rank, incidents, spec.failure, incarnation=incarnation, record=record)
