"""A Lighthouse in a process of its own, which outlives the node that started it."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from holdfast.elastic import (
    Identity,
    Lighthouse,
    LighthouseAway,
    MembershipSettings,
    heartbeat_ages,
    lighthouse_url,
)
from holdfast.launch.agent.settings import AgentSettings
from holdfast.launch.processes import fork_child
from holdfast.parallel.errors import MembershipError
from holdfast.parallel.links import Tunnels
from holdfast.parallel.output import name_process

_LOOK_S = 0.5
SILENCE_S = 5.0
"""Seconds after the last heartbeat of any worker after which a run counts as over."""


@contextlib.contextmanager
def joined_lighthouse(
    settings: AgentSettings, address: str, tunnels: Tunnels
) -> Iterator[MembershipSettings]:
    """The membership settings with the URL of the Lighthouse; starts one here if none is named.

    Args:
        address: the address, if it was unknown when the settings were made.
        tunnels: through these this node's processes reach it.
    """
    membership = settings.membership
    if where := address or membership.lighthouse:
        yield replace(membership, lighthouse=lighthouse_url(where)).through(tunnels)
        return
    server = Lighthouse(
        settings.host,
        membership.lighthouse_key,
        heartbeat_timeout_ms=membership.heartbeat_timeout_ms,
        on_stranger=settings.on_stranger,
    )
    try:
        yield replace(membership, lighthouse=server.address).through(tunnels)
    finally:
        server.close()


@contextlib.contextmanager
def detached_lighthouse(
    host: str, membership: MembershipSettings, on_stranger: Callable[[str], None] | None = None
) -> Iterator[str]:
    """The URL of a new Lighthouse for a run. Call it in a process without threads.

    The Lighthouse outlives this process, however that ends, as long as workers of the run send
    heartbeats.

    Args:
        host: the address to listen on, as all nodes reach it.
        on_stranger: see `Lighthouse`.
    Raises:
        MembershipError: the address cannot be listened on.
    """
    told, tell = os.pipe()
    gone, here = os.pipe()

    def body() -> int:
        os.setsid()
        _close_all_but({tell, gone})
        return _serve(host, membership, on_stranger, tell, gone)

    fork_child(body, outlives=True)
    os.close(tell)
    os.close(gone)
    try:
        with open(told, encoding="utf-8") as lines:
            address, _, error = lines.read().partition("\n")
        if not address:
            raise MembershipError(error or f"the Lighthouse on {host} has ended at once")
        yield address
    finally:
        os.close(here)


def _close_all_but(descriptors: set[int]) -> None:
    """Close all other descriptors, so that this process keeps no pipe open."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in descriptors:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _serve(
    host: str,
    membership: MembershipSettings,
    on_stranger: Callable[[str], None] | None,
    tell: int,
    gone: int,
) -> int:
    name_process("quorum")
    timeout_ms = membership.heartbeat_timeout_ms
    try:
        server = Lighthouse(
            host,
            membership.lighthouse_key,
            heartbeat_timeout_ms=timeout_ms,
            on_stranger=on_stranger,
        )
    except MembershipError as error:
        os.write(tell, f"\n{error}".encode())
        return 1
    os.write(tell, server.address.encode())
    os.close(tell)
    select.select([gone], [], [])  # readable once the process that started it has ended
    here = replace(membership, lighthouse=server.address).through(Tunnels())
    wait_for_silence(lambda: heartbeat_ages(here.lighthouse, here.run), 2 * timeout_ms / 1000)
    return 0


def wait_for_silence(
    ages: Callable[[], Mapping[Identity, float]],
    recent_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until no worker of a run has sent heartbeats for a while.

    Args:
        ages: the seconds since the last heartbeat of each worker, which may raise `LighthouseAway`.
        recent_s: a worker with a younger heartbeat lives.
    """
    heard_at_s = clock()
    while clock() - heard_at_s < SILENCE_S:
        with contextlib.suppress(LighthouseAway):
            if min(ages().values(), default=recent_s) < recent_s:
                heard_at_s = clock()
        sleep(_LOOK_S)
