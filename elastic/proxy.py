"""The reports on behalf of a worker whose process has ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from holdfast.elastic.agreement import AcceptorFile, AcceptorState, PassedOver, Report, aware
from holdfast.elastic.generation import Identity
from holdfast.elastic.lighthouse import LighthouseAway, RoundTimeout
from holdfast.elastic.quorum_client import PAUSE_S, MembershipSettings, QuorumClient
from holdfast.parallel.errors import MembershipError

_PAUSE_UNREACHABLE_S = 0.1


def report_on_behalf_of(
    identity: Identity,
    settings: MembershipSettings,
    acceptor_file: AcceptorFile,
    stop: threading.Event,
    *,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Report for a worker whose process has ended, until all know of a generation without it.

    Blocks; run it in a thread. It keeps what the worker has accepted, so the rule of agreement
    holds. It also completes rounds, so no worker waits for the dead one's heartbeats to grow old.
    The answer of the round that chose the generation may be lost on the way to some; if these are
    no majority of the last one, they depend on the acceptances of the dead to learn of it.

    Args:
        stop: ends the reports at the next round.
        data: values for the members, sent with the report, such as why the process ended.
    """
    with acceptor_file.held(wait=True):
        client = QuorumClient(identity, settings, acceptor_file)
        report = Report(
            identity,
            alive=False,
            world_size=settings.world_size,
            min_ranks=settings.min_ranks,
            data=data or {},
        )
        chosen: AcceptorState | None = None
        while chosen is None and not stop.is_set():
            try:
                verdict, _ = client.round(report, settings.call_s)
            except PassedOver as over:
                chosen = over.chosen
                continue
            except MembershipError:
                stop.wait(_PAUSE_UNREACHABLE_S)
                continue
            if verdict.acceptor.generation and identity not in verdict.acceptor.members:
                return
            if verdict.outcome == "wait":
                stop.wait(PAUSE_S)
        if chosen is not None:
            _await_all(client, replace(report, acceptor=client.acceptor), chosen, stop)


def _await_all(
    client: QuorumClient, report: Report, chosen: AcceptorState, stop: threading.Event
) -> None:
    """Repeat a report until all members of a chosen generation know of it, or have given up."""
    settings = client.settings
    end_s = time.monotonic() + settings.agree_s
    know: frozenset[Identity] = frozenset()
    while not (know >= chosen.members or stop.wait(PAUSE_S) or time.monotonic() > end_s):
        with contextlib.suppress(LighthouseAway, RoundTimeout):
            know |= aware(chosen, client.exchange(report, settings.call_s))
