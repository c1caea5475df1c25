"""Elastic runs over several machines: each task of srun or mpirun is an agent; others may join.

The first task opens the run's folder, which all nodes share, and hosts the Lighthouse if
`elastic.lighthouse` names none. The other tasks learn both from it, over one short connection each.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from holdfast.elastic import lighthouse_url
from holdfast.launch.agent import Agent, AgentSettings, detached_lighthouse
from holdfast.launch.health import HealthReport, NodeRefused, require_health
from holdfast.launch.launchers.display_process import start_display
from holdfast.launch.launchers.elastic import (
    ROOTS,
    check_lighthouse,
    explained,
    failures_of,
    log_agents,
    node_settings,
    tells_of_strangers,
    watching,
    worker_main,
)
from holdfast.launch.launchers.health_admission import (
    admit_founders,
    admit_newcomer,
    report_of_this_node,
)
from holdfast.launch.launchers.join_file import JoinInfo, is_under_way, published_join_file
from holdfast.launch.machine_errors import MachineRoots
from holdfast.parallel.errors import ConfigError, HoldfastError
from holdfast.parallel.files import machine_identity
from holdfast.parallel.links import (
    ONE_SECRET,
    StrangerError,
    answer_all,
    ask,
    listen,
    until_answered,
)
from holdfast.parallel.output import Waiting
from holdfast.parallel.reading import decode_json
from holdfast.trainer.config import RunConfig, check_config, with_removals
from holdfast.trainer.run import (
    RunAnswer,
    RunDirectory,
    RunRequest,
    opened_run,
    recorded_throughput,
    run_secret,
    told_run,
)
from holdfast.trainer.terms import Terms, TermsDiffer, config_terms, judge, software_versions
from holdfast.trainer.worlds import WorldInfo

MEET_S = 120.0
"""Seconds that the tasks of a job wait for each other."""


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
            check_lighthouse(request.config.elastic.lighthouse, world.secret)
            given = RunDirectory(request.out or Path())
            health = report_of_this_node(request.config, given, node)
            opened = held.enter_context(opened_run(request))
        except HoldfastError as error:
            tell_others(listening, world, RunAnswer(error=str(error)), request.config)
            raise
        config, run = opened.config, opened.directory
        log_agents(run.agent_log)
        host = node.host if config.elastic.lighthouse else listening.getsockname()[0]
        node = replace(node, log=run.log, incidents=run.incidents, host=host)
        node = watching(_enrolled(node, run), run, ROOTS)
        _forget_earlier_starts(node)
        held.callback(start_display(config, run).close)
        agent = Agent(node, worker_main(config, run))
        announce = held.enter_context(published_join_file(run))
        lighthouse = held.enter_context(_lighthouse(node))
        answer = RunAnswer(root=str(run.root.absolute()), resume=run.resume, lighthouse=lighthouse)
        reports = tell_others(listening, world, answer, request.config, health=health)
        if reports:
            admit_founders(run, node.membership.run, reports)
        announce(JoinInfo.begun(node.membership, lighthouse))
        code = agent.run(lighthouse)
        code = explained(code, run, node.ranks, agent.shutdown.reason)
    return _end_of_task(request.config, code, agent)


def run_other_task(config: RunConfig, world: WorldInfo) -> int:
    """Run the agent of another task of the job until the run ends. Returns the exit code.

    Call it in a process without threads.

    Raises:
        ConfigError: the first task cannot be reached, or reported an error.
    """
    health = report_of_this_node(config, RunDirectory(Path()), _task_settings(config, world))
    answer, host = ask_first(world, config, health=health)
    run, lighthouse = told_run(answer)
    config = with_removals(recorded_throughput(config, run.root), run.resume.removals)
    node = replace(_task_settings(config, world), log=run.log, incidents=run.incidents, host=host)
    node = watching(_enrolled(node, run), run, ROOTS)
    check_lighthouse(lighthouse, node.membership.secret)
    log_agents(_log_of(run, node))
    agent = Agent(node, worker_main(config, run))
    code = agent.run(lighthouse)
    return _end_of_task(config, explained(code, run, node.ranks, agent.shutdown.reason), agent)


def _enrolled(node: AgentSettings, run: RunDirectory) -> AgentSettings:
    """The settings of an agent with the secret of its run and the roll of this start of the run.

    Raises:
        ConfigError: the run's folder has no secret, or others may read it.
    """
    roll = (run.agent_log.parent / "agents" / node.membership.run).absolute()
    secret = run_secret(os.environ, run.root)
    return replace(
        node,
        membership=replace(node.membership, roll=str(roll), secret=secret),
        roll=roll,
        failure=failures_of(run),
        on_stranger=tells_of_strangers(run),
    )


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
    return detached_lighthouse(node.host, membership, node.on_stranger)


def _end_of_task(config: RunConfig, code: int, agent: Agent) -> int:
    """The exit code of a task; one whose MPI process ended before the run is killed.

    mpirun (Open MPI 5) tells other processes of an end by a signal, but not of an end with an exit
    code. They then wait in `Shrink` until they are told.
    """
    early = agent.shutdown.has_left or code not in (0, ConfigError.exit_code, 130)
    if config.parallel.backend == "mpi" and early:
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return code


def join_run(
    run: RunDirectory,
    config: RunConfig,
    info: JoinInfo,
    ranks: tuple[int, ...],
    roots: MachineRoots = ROOTS,
) -> int:
    """Join a run under way with new ranks on this machine. Returns the exit code.

    Call it in a process without threads.

    Args:
        run, config: the run's folder, which this machine shares with the others, and the
            configuration in it.
        info, ranks: the result of `take_ranks`.
        roots: where the kernel tells of errors of this machine.
    Raises:
        ConfigError: the run cannot grow.
    """
    if config.parallel.backend == "mpi":
        raise ConfigError(f"{run.root} uses parallel.backend = 'mpi', whose processes are fixed")
    if config.checkpoint.memory_every and info.machine != machine_identity():
        raise ConfigError(
            f"checkpoint.memory_every = {config.checkpoint.memory_every}: the run keeps copies in "
            "the memory of its machine, and this is another one; join from there, or start the run "
            "with 0"
        )
    elastic = msgspec.structs.replace(config.elastic, lighthouse=info.lighthouse)
    config = msgspec.structs.replace(config, elastic=elastic)
    check_config(config)
    node = replace(
        _enrolled(node_settings(config, run, token=info.token, ranks=ranks), run),
        founder=False,
        is_over=lambda: not is_under_way(run, info.token),
    )
    if (report := report_of_this_node(config, run, node)) is not None:
        admit_newcomer(run, info.token, report)
    node = watching(node, run, roots)
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
        config,
        RunDirectory(Path()),
        token=f"{world.job}-{world.attempt}",
        ranks=mine,
    )
    return replace(node, first_local_rank=mine[0] - first_here)


@contextlib.contextmanager
def _listen(world: WorldInfo) -> Iterator[socket.socket]:
    try:
        with listen(world.store_host, world.store_port) as listening:
            yield listening
    except OSError as error:
        raise ConfigError(
            f"the first task cannot listen on {world.store_host}:{world.store_port}: {error}; set "
            "MASTER_ADDR to the first node's address and MASTER_PORT to a free port"
        ) from error


def tell_others(
    listening: socket.socket,
    world: WorldInfo,
    answer: RunAnswer,
    config: RunConfig,
    *,
    health: HealthReport | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[HealthReport]:
    """Answer each other task once, after all of them have connected with the job's secret.

    If nodes are sick, the other tasks get that as an error.

    Args:
        health: the report on this node, if the run asks for one.
    Returns:
        The reports on all nodes, if the run asks for them.
    Raises:
        TermsDiffer: a task has another configuration, or other versions; all of them are told.
        ConfigError: one has not come in time.
    """
    here = f"{world.store_host}:{world.store_port}"
    waiting = Waiting(f"the other tasks of the job to come to {here}", MEET_S, clock=clock)
    differing: list[str] = []
    reports = [health] if health is not None else []

    def answered(said: Mapping[int, bytes]) -> bytes:
        words = {task: _word_in(text) for task, text in said.items()}
        differing.extend(_differing(config, {task: word.terms for task, word in words.items()}))
        if health is not None:
            reports.extend(word.health for word in words.values() if word.health is not None)
        wrong = "\n".join(differing) or _sickness(reports)
        return msgspec.json.encode(RunAnswer(error=wrong) if wrong and not answer.error else answer)

    missing = answer_all(
        listening,
        world.meeting_key,
        range(1, world.world_size),
        answered,
        lambda missing: waiting.left_s(f"tasks {missing} have not come"),
    )
    if missing:
        raise ConfigError(
            f"tasks {missing} have not come within {MEET_S:g} s; see their logs, and whether they "
            f"reach {here}"
        )
    if differing and not answer.error:
        raise TermsDiffer("\n".join(differing))
    return reports


class TaskWord(msgspec.Struct, frozen=True):
    """What a task says of itself when it asks."""

    terms: Terms
    health: HealthReport | None = None


def _word_in(text: bytes) -> TaskWord:
    try:
        return decode_json(text, TaskWord)
    except ValueError as error:
        return TaskWord(Terms(error=f"another version of holdfast ({error})"))


def _sickness(reports: Sequence[HealthReport]) -> str:
    """Why nodes are refused; empty: none is."""
    try:
        require_health(reports)
    except NodeRefused as error:
        return str(error)
    return ""


def _task_terms(config: RunConfig) -> Terms:
    """What is known of a task's terms before its workers start."""
    return Terms(config_terms(config), versions=software_versions())


def _differing(config: RunConfig, said: Mapping[int, Terms]) -> tuple[str, ...]:
    """What differs between the first task and the others, one line each.

    Args:
        said: by task, its terms.
    """
    found = {0: _task_terms(config), **said}
    return judge(found, names=[f"task {task}" for task in range(len(found))]).refused


def ask_first(
    world: WorldInfo,
    config: RunConfig,
    *,
    health: HealthReport | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[bytes, str]:
    """The answer of the first task, and this machine's address towards it.

    Args:
        health: the report on this node, if the run asks for one.
    Raises:
        ConfigError: the first task has not answered in time, or the run cannot begin.
    """
    there = f"{world.store_host}:{world.store_port}"
    word = msgspec.json.encode(TaskWord(_task_terms(config), health))
    waiting = Waiting(f"the first task at {there}", MEET_S, clock=clock)

    def asked(left_s: float) -> tuple[bytes, str]:
        with waiting.in_a_call():  # the others may not all have come
            here = (world.store_host, world.store_port, world.meeting_key)
            return ask(*here, world.rank, left_s, word)

    try:
        answer, own = until_answered(asked, waiting.left_s, sleep=sleep)
    except StrangerError as error:
        raise ConfigError(
            f"what answers at {there} is not the first task of this job: {error}; {ONE_SECRET}"
        ) from error
    except TimeoutError as error:
        raise ConfigError(
            f"the first task at {there} did not answer within {MEET_S:g} s: {error}; set "
            "MASTER_ADDR and MASTER_PORT alike on all nodes"
        ) from error
    return answer, own
