"""Elastic runs over several machines: each task of srun or mpirun is an agent; others may join.

The first task opens the run's folder, which all nodes share, and hosts the Lighthouse if
`elastic.lighthouse` names none. The other tasks learn both from it, over one short connection each.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from holdfast.elastic import lighthouse_url
from holdfast.launch.agent import Agent, AgentSettings, detached_lighthouse
from holdfast.launch.launchers.display_process import start_display
from holdfast.launch.launchers.elastic import (
    check_lighthouse,
    explained,
    failures_of,
    log_agents,
    node_settings,
    worker_main,
)
from holdfast.launch.launchers.join_file import JoinInfo, is_under_way, published_join_file
from holdfast.parallel.errors import ConfigError, HoldfastError
from holdfast.parallel.waiting import Waiting
from holdfast.trainer.config import RunConfig, check_config
from holdfast.trainer.run import Resume, RunDirectory, RunRequest, opened_run, recorded_throughput
from holdfast.trainer.worlds import WorldInfo

MEET_S = 120.0
"""Seconds that the tasks of a job wait for each other."""
_RETRY_S = 0.2
_LOOK_S = 1.0
_HELLO_S = 5.0
"""Seconds for one connection, and for the first line over it."""


def task_ranks(task: int, tasks: int, ranks: int) -> tuple[int, ...]:
    """The ranks of a task: contiguous, and as even as possible. Pure.

    Raises:
        ConfigError: there are more tasks than ranks.
    """
    if tasks > ranks:
        raise ConfigError(
            f"{tasks} tasks were started for a layout of {ranks} ranks; start one task per node, "
            "and no more than one per rank"
        )
    return tuple(range(task * ranks // tasks, (task + 1) * ranks // tasks))


def run_first_task(request: RunRequest, world: WorldInfo) -> int:
    """Run the agent of a job's first task until the run ends. Returns the exit code.

    Call it in a process without threads.

    Args:
        world: the world of tasks from the launcher.
    Raises:
        HoldfastError: the run cannot be opened, or tasks do not fit or do not connect. The other
            tasks get the error.
    """
    with contextlib.ExitStack() as held:
        listening = held.enter_context(_listen(world))
        try:
            node = _task_settings(request.config, world)
            check_lighthouse(request.config.elastic.lighthouse)
            opened = held.enter_context(opened_run(request))
        except HoldfastError as error:
            tell_others(listening, world, {"error": str(error)})
            raise
        config, run = opened.config, opened.directory
        log_agents(run.agent_log)
        host = node.host if config.elastic.lighthouse else listening.getsockname()[0]
        node = _enrolled(replace(node, log=run.log, host=host), run)
        _forget_earlier_starts(node)
        held.callback(start_display(config, run).close)
        agent = Agent(node, worker_main(config, run))
        announce = held.enter_context(published_join_file(run))
        lighthouse = held.enter_context(_lighthouse(node))
        answer = {
            "root": str(run.root.absolute()),
            "resume": msgspec.to_builtins(run.resume),
            "lighthouse": lighthouse,
        }
        tell_others(listening, world, answer)
        announce(JoinInfo.begun(node.membership, lighthouse))
        code = agent.run(lighthouse)
        code = explained(code, run, node.ranks, agent.shutdown.reason)
    return _end_of_task(request.config, code)


def run_other_task(config: RunConfig, world: WorldInfo) -> int:
    """Run the agent of another task of the job until the run ends. Returns the exit code.

    Call it in a process without threads.

    Raises:
        ConfigError: the first task cannot be reached, or reported an error.
    """
    answer, host = ask_first(world)
    check_lighthouse(answer["lighthouse"])
    run = RunDirectory(Path(answer["root"]), msgspec.convert(answer["resume"], Resume))
    config = recorded_throughput(config, run.root)
    node = _enrolled(replace(_task_settings(config, world), log=run.log, host=host), run)
    log_agents(_log_of(run, node))
    agent = Agent(node, worker_main(config, run))
    code = agent.run(answer["lighthouse"])
    return _end_of_task(config, explained(code, run, node.ranks, agent.shutdown.reason))


def _enrolled(node: AgentSettings, run: RunDirectory) -> AgentSettings:
    """The settings of an agent with the roll of this start of the run."""
    roll = run.agent_log.parent / "agents" / node.membership.run
    failure = failures_of(run)
    membership = replace(node.membership, roll=str(roll.absolute()))
    return replace(node, membership=membership, roll=roll.absolute(), failure=failure)


def _forget_earlier_starts(node: AgentSettings) -> None:
    """Remove the rolls of earlier starts of the run."""
    assert node.roll is not None
    for roll in node.roll.parent.glob("*"):
        if roll != node.roll:
            shutil.rmtree(roll, ignore_errors=True)


def _lighthouse(node: AgentSettings) -> contextlib.AbstractContextManager[str]:
    """The named Lighthouse, or a new one that survives the loss of this task."""
    membership = node.membership
    if membership.lighthouse:
        return contextlib.nullcontext(lighthouse_url(membership.lighthouse))
    return detached_lighthouse(node.host, membership.run, membership.heartbeat_timeout_ms)


def _end_of_task(config: RunConfig, code: int) -> int:
    """The exit code of a task; a task that lost its MPI process gets that code.

    mpirun (Open MPI 5) tells other processes of an end by a signal, but not of an end with an exit
    code. They then wait in `Shrink` until they are told.
    """
    if config.parallel.backend == "mpi" and code not in (0, ConfigError.exit_code, 130):
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return code


def join_run(run: RunDirectory, config: RunConfig, info: JoinInfo, ranks: tuple[int, ...]) -> int:
    """Join a run under way with new ranks on this machine. Returns the exit code.

    Call it in a process without threads.

    Args:
        run, config: the run's folder, which this machine shares with the others, and the
            configuration in it.
        info, ranks: the result of `take_ranks`.
    Raises:
        ConfigError: the run cannot grow.
    """
    if config.parallel.backend == "mpi":
        raise ConfigError(f"{run.root} uses parallel.backend = 'mpi', whose processes are fixed")
    elastic = msgspec.structs.replace(config.elastic, lighthouse=info.lighthouse)
    config = msgspec.structs.replace(config, elastic=elastic)
    check_config(config)
    node = replace(
        _enrolled(node_settings(config, run, token=info.token, ranks=ranks), run),
        founder=False,
        is_over=lambda: not is_under_way(run, info.token),
    )
    log_agents(_log_of(run, node))
    agent = Agent(node, worker_main(config, run))
    return explained(agent.run(), run, ranks, agent.shutdown.reason)


def _log_of(run: RunDirectory, node: AgentSettings) -> Path:
    return run.agent_log.with_name(f"agent-{node.ranks[0]}.log")


def _task_settings(config: RunConfig, world: WorldInfo) -> AgentSettings:
    """The settings of a task's agent; `log` and `host` are not known yet."""
    tasks, ranks = world.world_size, config.parallel.ranks
    if config.parallel.backend == "mpi" and tasks != ranks:
        raise ConfigError(
            f"parallel.backend = 'mpi': {tasks} tasks were started for {ranks} ranks; start one "
            "per rank with mpirun --with-ft ulfm"
        )
    mine = task_ranks(world.rank, tasks, ranks)
    first_here = task_ranks(world.rank - world.local_rank, tasks, ranks)[0]
    node = node_settings(
        config, RunDirectory(Path()), token=f"{world.job}-{world.attempt}", ranks=mine
    )
    return replace(node, first_local_rank=mine[0] - first_here)


@contextlib.contextmanager
def _listen(world: WorldInfo) -> Iterator[socket.socket]:
    try:
        with socket.create_server((world.store_host, world.store_port)) as listening:
            yield listening
    except OSError as error:
        raise ConfigError(
            f"the first task cannot listen on {world.store_host}:{world.store_port}: {error}; set "
            "MASTER_ADDR to the first node's address and MASTER_PORT to a free port"
        ) from error


def tell_others(
    listening: socket.socket,
    world: WorldInfo,
    answer: dict[str, Any],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Answer each other task once, after all of them have connected.

    Raises:
        ConfigError: one has not come in time.
    """
    here = f"{world.store_host}:{world.store_port}"
    waiting = Waiting(f"the other tasks of the job to come to {here}", MEET_S, clock=clock)
    come: dict[int, socket.socket] = {}
    try:
        while len(come) < world.world_size - 1:
            missing = sorted(set(range(1, world.world_size)) - set(come))
            if (left_s := waiting.left_s(f"tasks {missing} have not come")) <= 0:
                raise ConfigError(
                    f"tasks {missing} have not come within {MEET_S:g} s; see their logs, and "
                    f"whether they reach {here}"
                )
            listening.settimeout(min(left_s, _LOOK_S))
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            hello = _received(connection, min(left_s, _HELLO_S))
            task = hello.get("task")
            if hello.get("job") != world.job or not isinstance(task, int):
                connection.close()
                continue
            come[task] = connection
        for connection in come.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")
    finally:
        for connection in come.values():
            connection.close()


def ask_first(
    world: WorldInfo,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[dict[str, Any], str]:
    """The answer of the first task, and this machine's address towards it.

    Raises:
        ConfigError: the first task has not answered in time, or the run cannot begin.
    """
    there = (world.store_host, world.store_port)
    waiting = Waiting(f"the first task at {there[0]}:{there[1]}", MEET_S, clock=clock)
    reason = ""
    while (left_s := waiting.left_s(reason)) > 0:
        try:
            with socket.create_connection(there, timeout=min(left_s, _HELLO_S)) as line:
                hello = {"task": world.rank, "job": world.job, "pid": os.getpid()}
                line.sendall(json.dumps(hello).encode() + b"\n")
                with waiting.in_a_call():  # the others may not all have come
                    answer = _received(line, left_s)
                if "error" in answer:
                    raise ConfigError(answer["error"])
                if answer:
                    return answer, str(line.getsockname()[0])
                reason = "it hung up"
        except OSError as error:
            reason = str(error)
        sleep(_RETRY_S)
    raise ConfigError(
        f"the first task at {there[0]}:{there[1]} did not answer within "
        f"{MEET_S:g} s: {reason}; set MASTER_ADDR and MASTER_PORT alike on all nodes"
    )


def _received(connection: socket.socket, timeout_s: float) -> dict[str, Any]:
    """One line of JSON; empty if there is none in time."""
    connection.settimeout(timeout_s)
    try:
        with connection.makefile("rb") as lines:
            found = json.loads(lines.readline())
            return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}
