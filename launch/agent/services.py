"""The services of a node: what its agent hosts, and the ways to those of other nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from holdfast.elastic import MembershipSettings
from holdfast.launch.agent.lighthouse_process import joined_lighthouse
from holdfast.launch.agent.settings import AgentSettings
from holdfast.parallel.links import StoreAccess, Tunnels, host_store


@dataclass(frozen=True, slots=True)
class Services:
    """What the processes of one node use."""

    membership: MembershipSettings
    """The settings with the Lighthouse's URL, as this node's processes reach it."""
    store: str
    """The address of this node's rendezvous store, as other nodes reach it."""
    access: StoreAccess
    """The way to the stores of all nodes."""


@contextlib.contextmanager
def hosted_services(
    settings: AgentSettings, lighthouse: str, processes: Callable[[], Collection[int]]
) -> Iterator[Services]:
    """Host the services of a node during the block.

    Args:
        lighthouse: the address of the Lighthouse, if it was unknown when the settings were made.
        processes: returns the processes of this node, which no other process can pass for.
    Raises:
        MembershipError, OSError, PeerLost: an address cannot be listened on.
    """
    with contextlib.ExitStack() as held:
        tunnels = held.enter_context(contextlib.closing(Tunnels(processes)))
        membership = held.enter_context(joined_lighthouse(settings, lighthouse, tunnels))
        access = StoreAccess(tunnels, membership.store_key)
        store, address = host_store(settings.host, access.key, settings.on_stranger)
        held.callback(store.close)
        held.enter_context(settings.signed(address))
        yield Services(membership, address, access)
