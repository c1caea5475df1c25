"""Several agents on this machine, each a node of its own, to try and test the failure of nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from holdfast.elastic import (
    Lighthouse,
    MembershipSettings,
    coordination,
    lighthouse_url,
    parse_identity,
    report_on_behalf_of,
)
from holdfast.elastic.agreement import AcceptorFile
from holdfast.launch.agent import Agent, AgentSettings, WorkerMain
from holdfast.launch.processes import Supervisor, fork_child, on_signals
from holdfast.parallel.errors import ConfigError, Stopped
from holdfast.parallel.links import Tunnels
from holdfast.parallel.output import name_process, tell_person

logger = logging.getLogger("holdfast.agent")

_LEFT = 64
"""The exit code by which a forked agent says that it has left a run that goes on."""
_END_S = 10.0
"""Seconds beyond `exit_s` that an agent may take to end once the run has ended on another node."""


def node_name(ranks: Sequence[int]) -> str:
    """The name of the node that has these ranks: the host's name and the first rank. Local.

    Agents may run on one host, and hosts may have one name; no two agents of a run share a rank.
    """
    return f"{socket.gethostname()}-{ranks[0]}"


def spread(node: AgentSettings, nodes: int) -> list[AgentSettings]:
    """Divide a node's ranks in order among several nodes.

    If there are fewer ranks than nodes, each rank gets a node. The first one looks for errors of
    the machine.
    """
    ranks = node.ranks
    nodes = min(nodes, len(ranks))
    if nodes == 1:
        return [node]
    edges = [k * len(ranks) // nodes for k in range(nodes + 1)]
    shares = [ranks[a:b] for a, b in pairwise(edges)]
    first, *others = (replace(node, ranks=share, node=node_name(share)) for share in shares)
    return [first, *(replace(other, roots=None) for other in others)]


def run_nodes(
    nodes: Sequence[AgentSettings],
    main: WorkerMain,
    folder: Path,
    announce: Callable[[str], None] = lambda _: None,
) -> int:
    """Run one agent per node, and a Lighthouse for all if none is named.

    Call it in the main thread of a process without other threads. If an agent is killed, its
    workers die with it. The others go on, because this process then reports for the dead workers.

    Args:
        folder: the folder of acceptor states and liveness timestamps, on this machine.
        announce: called with the Lighthouse's URL, once it runs.
    Returns:
        0 if a worker of any node reached the end of the run; 130 after SIGINT; the code with which
        an agent ended the run for all; otherwise the first exit code of an agent, or 3 if all were
        killed.
    """
    nodes = [replace(node, folder=folder / node.node) for node in nodes]
    if len(nodes) == 1:
        agent = Agent(nodes[0], main)
        with hosted_lighthouse(nodes[0]) as address:
            announce(address)
            code = agent.run(address)
        if agent.shutdown.reason:
            tell_person(agent.shutdown.reason)
        return code
    coordination()  # imported once here, not by every agent
    agents: dict[int, AgentSettings] = {}
    writers: list[int] = []
    for node in nodes:
        reader, writer = os.pipe()
        agents[_fork_agent(node, main, reader, (*writers, writer))] = node
        os.close(reader)
        writers.append(writer)
    with contextlib.ExitStack() as held:
        address = held.enter_context(hosted_lighthouse(nodes[0]))
        announce(address)
        for writer in writers:
            os.write(writer, address.encode())
            os.close(writer)
        tunnels = held.enter_context(contextlib.closing(Tunnels()))
        membership = replace(nodes[0].membership, lighthouse=address).through(tunnels)
        code = _watch(agents, membership)
    end = nodes[0].ended()
    return code if end is None or code in (0, 128 + signal.SIGINT) else end.code


@contextlib.contextmanager
def hosted_lighthouse(node: AgentSettings) -> Iterator[str]:
    """The URL of a run's Lighthouse: the named one, or one in this process during the block.

    Use it after the last fork.
    """
    if node.membership.lighthouse:
        yield lighthouse_url(node.membership.lighthouse)
        return
    server = Lighthouse(
        node.host,
        node.membership.lighthouse_key,
        heartbeat_timeout_ms=node.membership.heartbeat_timeout_ms,
        on_stranger=node.on_stranger,
    )
    try:
        yield server.address
    finally:
        server.close()


def _fork_agent(node: AgentSettings, main: WorkerMain, reader: int, others: Sequence[int]) -> int:
    """Fork an agent, which gets the Lighthouse's address from a pipe of its own.

    Args:
        others: the descriptors that it must close, so that its pipe ends with this process.
    """

    def body() -> int:
        name_process("agent")
        for descriptor in others:
            os.close(descriptor)
        agent = Agent(node, main)
        with open(reader, encoding="ascii") as told:
            lighthouse = told.read()
        code = agent.run(lighthouse)
        if agent.shutdown.reason:
            tell_person(agent.shutdown.reason)
        return _LEFT if agent.shutdown.has_left and not code else code

    return fork_child(body)


def _watch(agents: Mapping[int, AgentSettings], membership: MembershipSettings) -> int:
    """Wait for all agents, by process id; report on behalf of the workers of a killed one."""
    children = Supervisor(list(agents))
    forwarded: list[int] = []
    stop = threading.Event()
    codes: list[int] = []

    def forward(number: int) -> None:
        forwarded.append(number)
        children.signal(signal.SIGKILL if forwarded.count(signal.SIGINT) > 1 else number)

    with on_signals(forward):
        while children:
            for end in children.wait():
                if end.code == _LEFT:
                    logger.info("node %s has left", agents[end.pid].node)
                    continue
                codes.append(end.code)
                if end.code == 0:
                    # The run is over; a node that still waits to join it can end.
                    children.signal(signal.SIGTERM)
                    exit_s = max(node.exit_s for node in agents.values())
                    children.kill_at(time.monotonic() + exit_s + _END_S)
                elif end.code != ConfigError.exit_code:
                    node, how = agents[end.pid], f"exited with code {end.code}"
                    if end.code < 0:
                        how = f"was killed by {signal.Signals(-end.code).name}"
                    logger.warning("node %s is lost: its agent %s", node.node, how)
                    _report_for_node(node, membership, stop)
        stop.set()
    if signal.SIGINT in forwarded:
        return 128 + signal.SIGINT
    given = [code for code in codes if code >= 0]
    return 0 if 0 in given else next(iter(given), Stopped.exit_code)


def _report_for_node(
    node: AgentSettings, membership: MembershipSettings, stop: threading.Event
) -> None:
    """Report for all workers that a node has had.

    Each report begins once the worker's process has ended and freed its acceptor state.
    """
    folder = node.folder or Path()
    for path in sorted(folder.glob("*.acceptor")):
        identity = parse_identity(path.stem)
        threading.Thread(
            target=report_on_behalf_of,
            args=(identity, membership, AcceptorFile(folder, identity), stop),
            kwargs={"data": {"cause": f"node {node.node} was lost"}},
            name=f"holdfast-proxy-{identity}",
            daemon=True,
        ).start()
