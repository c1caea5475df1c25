"""The start of an elastic run on this machine: its agents and their settings."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from holdfast.elastic import (
    HangLimits,
    MembershipSettings,
    WorkerSpec,
    await_lighthouse,
    lighthouse_key,
    lighthouse_url,
)
from holdfast.launch.agent import AgentSettings, WorkerMain
from holdfast.launch.launchers.display_process import start_display
from holdfast.launch.launchers.health_admission import admit_founders, report_of_this_node
from holdfast.launch.launchers.interrupt import tell_interrupted
from holdfast.launch.launchers.join_file import JoinInfo, own_address, published_join_file
from holdfast.launch.launchers.local import keep_memory
from holdfast.launch.launchers.nodes import node_name, run_nodes, spread
from holdfast.launch.machine_errors import MachineError, MachineRoots
from holdfast.parallel.errors import ConfigError, Interrupted, Stopped
from holdfast.parallel.files import machine_identity, scratch_folder
from holdfast.parallel.links import given_secret, new_secret
from holdfast.parallel.output import LogFile, Waiting, tell
from holdfast.parallel.plan import replica_sizes
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports import EventFile
from holdfast.trainer.run import (
    RunDirectory,
    checkpoint_root,
    memory_root,
    read_error,
    run_secret,
)

logger = logging.getLogger("holdfast.agent")
ROOTS = MachineRoots()
"""Those of this machine."""
LIGHTHOUSE_S = 60.0
"""Seconds that a start waits for the Lighthouse that `elastic.lighthouse` names."""


_AGREE_SHARE = 0.95
"""The share of `elastic.apart_s` after which a worker gives up, so that its own reason is told."""


def run_elastic(config: RunConfig, run: RunDirectory, roots: MachineRoots = ROOTS) -> int:
    """Train on this machine, on `elastic.local_nodes` nodes. Returns the command's exit code.

    It is called in the main thread of a process without other threads.

    Args:
        roots: where the kernel tells of errors of this machine.
    Raises:
        ConfigError: the run needs MPI, another program answers instead of the Lighthouse, or this
            node is sick.
        LighthouseAway: no Lighthouse answers.
    """
    if config.parallel.backend == "mpi":
        raise ConfigError(
            "parallel.backend = 'mpi' with elastic.enabled: start the run with mpirun --with-ft "
            "ulfm, one task per rank"
        )
    secret = _secret_of(run)
    check_lighthouse(config.elastic.lighthouse, secret)
    log_agents(run.agent_log)
    ranks = tuple(range(config.parallel.ranks))
    node = node_settings(config, run, token=uuid.uuid4().hex, secret=secret, ranks=ranks)
    node = replace(node, on_stranger=tells_of_strangers(run))
    node = watching(node, run, roots)
    if (report := report_of_this_node(config, run, node)) is not None:
        admit_founders(run, node.membership.run, [report])
    memory = memory_root(run.root)
    display = start_display(config, run)
    try:
        with (
            scratch_folder() as folder,
            published_join_file(run) as announce,
        ):
            node = replace(node, roll=folder / "roll")
            code = run_nodes(
                spread(node, config.elastic.local_nodes),
                worker_main(config, run),
                folder,
                lambda lighthouse: announce(JoinInfo.begun(node.membership, lighthouse)),
            )
    finally:
        display.close()
        keep_memory(memory, checkpoint_root(run.root, config))
    if code == Interrupted.exit_code:
        from holdfast.trainer import root_cause

        tell_interrupted(run, root_cause(run, ranks), sys.argv)
    return explained(code, run, ranks)


def check_lighthouse(address: str, secret: str) -> None:
    """Wait for the named Lighthouse before anything is started; an empty address names none.

    Raises:
        ConfigError: another program answers there, or one that does not hold the secret.
        LighthouseAway: none answers in time.
    """
    if address:
        what = f"the Lighthouse at {address} to answer"
        waiting = Waiting(what, LIGHTHOUSE_S)
        await_lighthouse(lighthouse_url(address), waiting, lighthouse_key(secret))


def worker_main(config: RunConfig, run: RunDirectory) -> WorkerMain:
    """The work of an elastic run's workers; it imports their modules before they are forked."""
    from holdfast.trainer import run_elastic_worker
    from holdfast.trainer.elastic import train_elastic_worker  # noqa: F401

    def main(spec: WorkerSpec, channel: socket.socket) -> int:
        return run_elastic_worker(config, spec, channel, run)

    return main


def node_settings(
    config: RunConfig, run: RunDirectory, *, token: str, ranks: tuple[int, ...], secret: str = ""
) -> AgentSettings:
    """The settings of this machine's agent.

    Args:
        token: the name of this start of the run at its Lighthouse; each start has another.
        ranks: the ranks of this node.
        secret: the run's secret; empty: a new one.
    """
    elastic = config.elastic
    return AgentSettings(
        membership=MembershipSettings(
            elastic.lighthouse,
            token,
            config.parallel.ranks,
            # Fewer ranks than one stage needs cannot go on: they wait for others.
            max(elastic.min_ranks, min(replica_sizes(config.mesh, config.parallel.shard))),
            elastic.heartbeat_ms,
            elastic.heartbeat_timeout_ms,
            agree_s=_AGREE_SHARE * elastic.apart_s,
            hang_timeout_s=elastic.hang_timeout_s,
            secret=secret or new_secret(),
        ),
        ranks=ranks,
        node=node_name(ranks),
        machine=machine_identity(),
        log=run.log,
        incidents=run.incidents,
        host=own_address(elastic.lighthouse) if elastic.lighthouse else "127.0.0.1",
        limits=HangLimits(elastic.hang_timeout_s, elastic.startup_grace_s),
        respawn=elastic.respawn,
        exit_s=config.checkpoint.exit_s,
        apart_s=elastic.apart_s,
        failure=failures_of(run),
    )


def _secret_of(run: RunDirectory) -> str:
    """The secret of a run on this machine; one that no other process has if it cannot be kept."""
    if given := given_secret(os.environ):
        return given
    try:
        return run_secret(os.environ, run.root)
    except ConfigError as error:
        logger.warning("%s; until then no node can join this run", error)
        return new_secret()


def tells_of_strangers(run: RunDirectory) -> Callable[[str], None]:
    """A function that tells in the run's events of a connection that was dropped."""

    def record(what: str) -> None:
        with contextlib.closing(EventFile(run.events)) as events:
            events.append("stranger_refused", what=what)

    return record


def watching(node: AgentSettings, run: RunDirectory, roots: MachineRoots) -> AgentSettings:
    """The settings of an agent that looks for errors of its machine, if it is the first there."""
    if node.first_local_rank:
        return node
    return replace(node, roots=roots, on_machine_errors=tells_of_errors(run, node.node))


def tells_of_errors(run: RunDirectory, node: str) -> Callable[[Sequence[MachineError]], None]:
    """A function that tells in the run's events of errors of a node's machine."""

    def record(errors: Sequence[MachineError]) -> None:
        with contextlib.closing(EventFile(run.events)) as events:
            for error in errors:
                events.append(
                    "machine_error",
                    node=node,
                    kind=error.kind,
                    device=error.device,
                    count=error.count,
                    what=str(error),
                    serious=error.is_serious,
                )

    return record


def failures_of(run: RunDirectory) -> Callable[[int, int], str | None]:
    """A function that reads why a worker ended, where another would fail in the same way.

    A lost peer, or an error of the operating system, may be gone the next time.
    """

    def failure(rank: int, code: int) -> str | None:
        found = read_error(run, rank)
        if found is None or found.exit_code != code or code == Stopped.exit_code:
            return None
        kind = getattr(builtins, found.kind, None)
        transient = isinstance(kind, type) and issubclass(kind, (OSError, MemoryError))
        return None if transient else f"rank {rank}: {found.message}"

    return failure


def explained(code: int, run: RunDirectory, ranks: Iterable[int], reason: str = "") -> int:
    """The exit code of a node, after a line for the user if it is an error.

    Args:
        reason: the reason that the node's agent gives; empty where that of a worker is enough.
    """
    from holdfast.trainer import describe, root_cause

    if code not in (0, 130):
        cause = root_cause(run, ranks)
        line = describe(cause, run) if cause is not None else ""
        if reason and (cause is None or cause.message not in reason):
            line = f"holdfast: {reason} (log: {run.agent_log})"
        tell(line or f"holdfast: the run stopped (log: {run.agent_log})")
    return code


def log_agents(path: Path) -> None:
    """Send the log of this process, and of the processes it forks, to a file."""
    logger = logging.getLogger("holdfast")
    logger.handlers[:] = [LogFile(path, "%(asctime)s %(levelname)s %(name)s: %(message)s")]
    logger.setLevel(logging.INFO)
    logger.propagate = False
