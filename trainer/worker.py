"""One worker process: logging, store, training, and the report of its end."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

# torch imports it at the first backward pass, for half a second: here it is there before workers
# are forked.
import torch.fx.experimental.symbolic_shapes  # noqa: F401
from torch.distributed import Store, TCPStore

from holdfast.parallel.comm import LOOPBACK_NAMES, end_transports
from holdfast.parallel.errors import (
    ConfigError,
    Interrupted,
    PeerLost,
    Stopped,
    first_line,
    process_refusal,
)
from holdfast.parallel.files import torch_caches_in
from holdfast.parallel.links import (
    ANY_BEATS,
    ONE_SECRET,
    HostedStore,
    StoreAccess,
    StrangerError,
    Tunnels,
    knock,
    listen,
    until_answered,
)
from holdfast.parallel.output import (
    Waiting,
    name_process,
    stacks_on_signal,
    tell,
    tell_person,
)
from holdfast.trainer.config import RunConfig, check_config
from holdfast.trainer.loop import train
from holdfast.trainer.reports import keep_failure
from holdfast.trainer.run import RankError, RunDirectory, log_to_file, read_error, write_error
from holdfast.trainer.terms import own_terms, require_equal_terms
from holdfast.trainer.worlds import WorldInfo

if TYPE_CHECKING:
    from holdfast.elastic import WorkerSpec

STORE_TIMEOUT_S = 300.0
KNOCK_S = 5.0
_MEET_S = 0.05
PEER_REASON_S = 2.0
"""How long a rank that lost a peer waits for the peer's own reason, in seconds."""

logger = logging.getLogger("holdfast")

WorkerTask = Callable[[RunConfig, WorldInfo, Store, RunDirectory], None]
"""The work of a worker once it has its store."""


def connect(world: WorldInfo) -> Store:
    """The rendezvous store of the run; hosted here if the launcher says so.

    Raises:
        PeerLost: nothing answers at the address, or another program has its port.
        ConfigError: what answers does not hold the secret.
    """
    place = f"{world.store_host}:{world.store_port}"
    waiting = Waiting(f"the rendezvous store of rank 0 at {place}", STORE_TIMEOUT_S)
    try:
        if not world.secret:
            if not world.store_is_server:  # torch would try in silence, and print its stack
                until_answered(lambda left_s: _reach(world, left_s), waiting.left_s)
            with waiting.in_a_call():
                return _torch_store(world)
        key = world.store_key
        if world.store_is_server:
            hosted = listen(_listened_at(world), world.store_port)
            place = f"{world.store_host}:{hosted.getsockname()[1]}"
            # Its door's thread keeps it until this process ends.
            HostedStore(hosted, key)
        elif world.job:  # its host was started elsewhere, and may come later
            until_answered(lambda _: knock(place, key, KNOCK_S), waiting.left_s)
        tunnels = Tunnels(silent_beats=ANY_BEATS)
        with waiting.in_a_call():
            return StoreAccess(tunnels, key).connect(place, STORE_TIMEOUT_S, STORE_TIMEOUT_S)
    except StrangerError as error:
        raise ConfigError(
            f"what answers at {place} is not rank 0 of this job: {error}; {ONE_SECRET}"
        ) from error
    except (OSError, RuntimeError) as error:
        if process_refusal(error):
            raise
        reason = first_line(error)
        raise PeerLost(
            f"the rendezvous store at {place} cannot be used: {reason}; free the port or choose "
            "another (MASTER_PORT), name rank 0's machine as the others reach it (MASTER_ADDR), or "
            "unset RANK and WORLD_SIZE if they are left over"
        ) from error


def meet(
    store: Store,
    world: WorldInfo,
    *,
    tell: Callable[[str], None] = tell_person,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Say that this worker is there; rank 0 waits for all others. Collective over all workers.

    Raises:
        PeerLost: workers have not come in time.
    """
    store.set(f"here/{world.rank}", "")
    if world.rank:
        return
    what = f"the {world.world_size} workers at {world.store_host}:{world.store_port}"
    waiting = Waiting(what, STORE_TIMEOUT_S, tell=tell, clock=clock)
    missing = list(range(1, world.world_size))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        lacking = f"{len(missing)} have not come: rank {', '.join(map(str, missing[:8]))}"
        if waiting.left_s(lacking) <= 0:
            raise PeerLost(
                f"of {what}, {lacking}; see their logs, or unset RANK and WORLD_SIZE if they are "
                "left over"
            )
        sleep(_MEET_S)


def require_one_run(config: RunConfig, world: WorldInfo, store: Store) -> None:
    """Check that all ranks are going to train with the same. Collective over all workers.

    Raises:
        TermsDiffer: they are not, or one of them cannot train.
    """
    if world.world_size == 1:
        return
    notes = require_equal_terms(
        lambda: own_terms(config, world.local_rank), world.rank, range(world.world_size), store
    )
    for note in notes:
        logger.warning("%s", note)
        if world.rank == 0:
            tell(f"holdfast: note: {note}")


def _listened_at(world: WorldInfo) -> str:
    """The address on which the store's host listens; empty: all of them.

    A host may know its own name by another address than others do.
    """
    return world.store_host if world.store_host in LOOPBACK_NAMES else ""


def _reach(world: WorldInfo, within_s: float) -> None:
    """Return if something listens at the address of the store; else raise OSError."""
    address = (world.store_host, world.store_port)
    socket.create_connection(address, min(within_s, KNOCK_S)).close()


def _torch_store(world: WorldInfo) -> Store:
    """The store of torchrun's workers, as torch makes it."""
    timeout = timedelta(seconds=STORE_TIMEOUT_S)
    if not world.store_is_server:
        return TCPStore(world.store_host, world.store_port, wait_for_workers=False, timeout=timeout)
    listening = listen(_listened_at(world), world.store_port)
    return TCPStore(
        world.store_host,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listening.detach(),
    )


def run_worker(
    config: RunConfig,
    world: WorldInfo,
    run: RunDirectory,
    *,
    announce: bool,
    store: Store | None = None,
    task: WorkerTask = train,
) -> int:
    """Run `task` as one worker and return the process's exit code.

    Args:
        announce: also print the reason for the worker's end in one line, for a launcher that reads
            no error files. A rank that only lost a peer is silent if another rank has left its
            reason.
        store: the rendezvous store, if the worker has it already; the terms of all workers have
            then been compared.
        task: the work of the worker.
    """

    def body() -> None:
        check_config(config, world.world_size)
        try:
            connected = store
            if connected is None:
                connected = connect(world)
                require_one_run(config, world, connected)
            task(config, world, connected, run)
        except Stopped:  # as all ranks are
            end_transports()
            raise
        end_transports()

    def report(reason: RankError) -> None:
        if world.rank and reason.kind in (Stopped.__name__, Interrupted.__name__):
            return  # rank 0 tells
        if not (reason.kind == PeerLost.__name__ and another_rank_tells(run, world)):
            tell(describe(reason, run))

    name_process(f"r{world.rank}")
    log_to_file(run, world.rank)
    logger.info("pid %d, %d workers", os.getpid(), world.world_size)

    def keep(error: BaseException) -> None:
        keep_failure(error, world.rank, run.incidents)

    return _exit_code_of(body, config, run, world.rank, report if announce else None, keep)


def run_elastic_worker(
    config: RunConfig, spec: WorkerSpec, channel: socket.socket, run: RunDirectory
) -> int:
    """Run one worker of an elastic run and return the process's exit code."""
    from holdfast.trainer.elastic import leave_failure, train_elastic_worker

    name_process(f"r{spec.rank}")
    log_to_file(run, spec.rank)
    logger.info("pid %d, rank %s of node %s", os.getpid(), spec.identity, spec.node)
    run.error(spec.rank).unlink(missing_ok=True)  # it told of the end of the worker before
    try:
        stacks_on_signal(spec.stacks)
    except OSError as error:
        logger.warning("an agent cannot have the stacks of this worker: %s", error)
    return _exit_code_of(
        lambda: train_elastic_worker(config, spec, channel, run),
        config,
        run,
        spec.rank,
        None,
        lambda error: leave_failure(error, spec, run.incidents),
    )


def _exit_code_of(
    body: Callable[[], None],
    config: RunConfig,
    run: RunDirectory,
    rank: int,
    report: Callable[[RankError], None] | None,
    keep: Callable[[BaseException], None],
) -> int:
    """Call `body` and return the exit code of the process.

    A failure is written to the log with a traceback, and to the rank's error file in one line.

    Args:
        report: called with the reason of a failure, after it was written.
        keep: keeps evidence of an error.
    """
    try:
        with nullcontext() if config.train.compile else torch_caches_in(run.log(rank).parent):
            body()
    except KeyboardInterrupt:
        logger.info("interrupted")
        return 130
    except BaseException as error:
        if isinstance(error, Stopped):
            logger.info("%s", error)
        else:
            logger.exception("this worker ends")
            keep(error)
        reason = write_error(run, rank, error)
        if report is not None:
            report(reason)
        return reason.exit_code
    logger.info("finished")
    return 0


def describe(reason: RankError, run: RunDirectory) -> str:
    """The line for a person (or one line per configuration problem)."""
    return f"holdfast: rank {reason.rank}: {reason.message} (log: {run.log(reason.rank)})"


def root_cause(run: RunDirectory, ranks: Iterable[int]) -> RankError | None:
    """The reason that explains the others: of the first rank that failed by itself, else of any."""
    reasons = [found for rank in ranks if (found := read_error(run, rank)) is not None]
    own = [reason for reason in reasons if reason.kind != PeerLost.__name__]
    return next(iter(own or reasons), None)


def another_rank_tells(
    run: RunDirectory,
    world: WorldInfo,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether a rank that lost a peer can be silent, because another one reports the reason."""
    deadline = clock() + PEER_REASON_S
    while clock() < deadline:
        cause = root_cause(run, range(world.world_size))
        if cause is not None and cause.kind != PeerLost.__name__:
            return True
        sleep(0.05)
    first = root_cause(run, range(world.world_size))
    return first is not None and first.rank < world.rank
