"""The room on this machine for the processes, the connections and the state of a run.

What is started may grow with a number of the configuration only as far as the machine allows: a
layout of a thousand ranks is planned here, and trained elsewhere. Needs no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from holdfast.parallel.errors import ConfigError, counted, size_text
from holdfast.parallel.links import allow_descriptors
from holdfast.parallel.plan import rank_memory
from holdfast.trainer.config import RunConfig, machine_memory_bytes
from holdfast.trainer.step import plan_of, state_format

_PER_CORE = 32
"""Processes on a core: more only take turns, and heartbeats come late."""
_PROCESS_BYTES = 96 << 20
"""What a worker takes for itself, beside code that is shared and the state of the model."""
_COUNT_THREADS = """
import os, sys, threading
threading.stack_size(1 << 16)
begun = 0
try:
    while begun < int(sys.argv[1]):
        threading.Thread(target=threading.Event().wait).start()
        begun += 1
except RuntimeError:
    pass
print(begun, flush=True)
os._exit(0)
"""
_COUNT_S = 30.0
_GPU = Path("/dev/nvidiactl")
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True, slots=True)
class Machine:
    """The cores and the memory that processes of this machine may use."""

    cores: int
    memory_bytes: int
    has_gpu: bool = False

    @property
    def most_processes(self) -> int:
        """The number of worker processes that there is room for."""
        return max(1, min(_PER_CORE * self.cores, self.memory_bytes // _PROCESS_BYTES))


def this_machine() -> Machine:
    """The machine within the limits of this process's control group. Local."""
    cores = len(os.sched_getaffinity(0))
    return Machine(cores, machine_memory_bytes(), _GPU.exists())


def require_processes(count: int, what: str, machine: Machine | None = None) -> None:
    """Check that there is room for so many worker processes here.

    Args:
        what: the reason for that many, for the message: a layout or an option.
        machine: None: this one.
    Raises:
        ConfigError: there is not.
    """
    machine = machine or this_machine()
    if count > machine.most_processes:
        raise ConfigError(
            f"{what}: {count} processes, but this machine ({machine.cores} cores, "
            f"{machine.memory_bytes / 2**30:.1f} GiB) has room for {machine.most_processes}; "
            "lower it, or use more machines (torchrun, srun or mpirun)"
        )


def require_loopback() -> None:
    """Check that processes of this machine can connect to each other at 127.0.0.1. Local.

    Raises:
        ConfigError: they cannot, as in a network namespace whose loopback is down.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            socket.create_connection(listening.getsockname(), timeout=10.0).close()
    except OSError as error:
        raise ConfigError(
            f"processes here cannot connect to each other at 127.0.0.1: {error.strerror or error}; "
            "bring the loopback interface up (ip link set lo up)"
        ) from error


def require_ports(
    ranks_here: int, nodes_here: int, free: Callable[[int], int] | None = None
) -> None:
    """Check that this machine has enough free local ports for its ranks to connect.

    With too few of them ranks would wait for each other at the start, or after a loss.

    Args:
        nodes_here: the agents of an elastic run on this machine; 0: the run is not elastic.
        free: see `free_ports`, the default.
    Raises:
        ConfigError: there are too few.
    """
    # A rank listens for others and for its own store clients, and has three connections to one
    # store behind its door, and others to ranks. In an elastic run it has as many again for the
    # Lighthouse and for its replacement, and each agent asks ten times a second: a port of a
    # connection that has ended is free again after a second or more.
    needed = 8 + 8 * ranks_here + (8 * ranks_here + 24 * nodes_here if nodes_here else 0)
    found = needed if ranks_here == 1 else (free or free_ports)(needed)
    if found < needed:
        lowest, _, highest = "-".join(_PORT_RANGE.read_text().split()).partition("-")
        raise ConfigError(
            f"the {ranks_here} ranks here need at least {needed} local ports to connect, and "
            f"{found} are free (net.ipv4.ip_local_port_range is {lowest} to {highest}); widen that "
            "range, end what uses the ports, or start fewer ranks here"
        )


def require_descriptors(ranks_here: int, limit: int | None = None) -> None:
    """Check that a process of this machine may open enough files and connections for its ranks.

    Args:
        limit: the most that a process may open; None: that of this process, raised as far as it may
            be.
    Raises:
        ConfigError: it may not.
    """
    # An agent was seen with 55 and 21 for each rank: its links, and what it writes.
    needed = 128 + 32 * ranks_here
    found = allow_descriptors() if limit is None else limit
    if found < needed:
        raise ConfigError(
            f"the {ranks_here} ranks here need up to {needed} open files and connections in a "
            f"process, and its limit is {found}; raise the limit (ulimit -n), or start fewer ranks "
            "here"
        )


def require_threads(
    ranks_here: int,
    nodes_here: int,
    threads_per_rank: int,
    free: Callable[[int], int] | None = None,
) -> None:
    """Check that this user or container may start the threads and processes of its ranks.

    Args:
        nodes_here: the agents of an elastic run on this machine; 0: the run is not elastic.
        free: see `free_threads`, the default.
    Raises:
        ConfigError: it may not.
    """
    # A worker was seen with 10 threads, an agent with 6, and in an elastic run each may have a
    # replacement that starts beside it.
    needed = (10 + threads_per_rank) * ranks_here
    needed += 12 * (ranks_here + nodes_here) if nodes_here else 0
    found = (free or free_threads)(needed)
    if found < needed:
        raise ConfigError(
            f"the {ranks_here} ranks here need up to {needed} processes and threads, and {found} "
            "more may begin (ulimit -u, pids.max); raise that limit, end others, or start fewer "
            "ranks here"
        )


def free_threads(most: int) -> int:
    """The number of threads that may begin now, counted up to `most`. Local.

    They begin in a process of their own: each would keep some address space of this one.
    """
    command = [sys.executable, "-I", "-S", "-c", _COUNT_THREADS, str(most)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_COUNT_S)
        return int(done.stdout)
    except BlockingIOError:  # not even one process
        return 0
    except (OSError, ValueError, subprocess.TimeoutExpired):  # there may be enough
        return most


def free_ports(most: int) -> int:
    """The number of local ports that are free now, counted up to `most`. Local."""
    with contextlib.ExitStack() as held:
        for found in range(most):
            try:
                held.enter_context(socket.socket()).bind(("127.0.0.1", 0))
            except OSError as error:  # without descriptors to count further, there are enough
                return found if error.errno == errno.EADDRINUSE else most
    return most


def require_room(config: RunConfig, ranks_here: int, machine: Machine | None = None) -> None:
    """Check that this machine has room for its workers and for their part of the model.

    Raises:
        ConfigError: it has not.
    """
    machine = machine or this_machine()
    require_processes(ranks_here, f"the layout {config.parallel.mesh.text}", machine)
    threads = config.train.threads_per_rank
    if threads * ranks_here > _PER_CORE * machine.cores:
        raise ConfigError(
            f"train.threads_per_rank = {threads}: {threads * ranks_here} threads on this machine, "
            f"which has {machine.cores} cores; at most {_PER_CORE} a core"
        )
    require_descriptors(ranks_here)
    if ranks_here > 1 or config.elastic.enabled:
        require_loopback()
    nodes_here = config.elastic.local_nodes if config.elastic.enabled else 0
    require_ports(ranks_here, nodes_here)
    require_threads(ranks_here, nodes_here, threads)
    arenas = ranks_here * config.checkpoint.arena_mib << 20
    if arenas > machine.memory_bytes:
        raise ConfigError(
            f"checkpoint.arena_mib = {config.checkpoint.arena_mib}: the {ranks_here} ranks here "
            f"would take {size_text(arenas)}, and this machine has "
            f"{size_text(machine.memory_bytes)}; lower it, or set it to 0"
        )
    if config.train.device == "cuda" or (config.train.device == "auto" and machine.has_gpu):
        return  # the state is in the memory of the GPUs
    needed = _rank_bytes(config) * ranks_here
    if needed > machine.memory_bytes:
        parallel = config.parallel
        shared = parallel.data == 1 or (parallel.shard == "parameters" and not parallel.shard_group)
        share = "" if shared else "set parallel.shard = 'parameters', "
        raise ConfigError(
            f"the {ranks_here} ranks here need about {needed / 2**30:,.1f} GiB, and this machine "
            f"has {machine.memory_bytes / 2**30:,.1f}; see holdfast plan: {share}lower the model "
            "or the micro-batch, recompute or offload activations, or use more machines"
        )


def idle_cores_note(config: RunConfig, ranks_here: int, machine: Machine | None = None) -> str:
    """A line for a person where the ranks use at most half of a machine's cores; else "".

    The number of threads is no default that follows from the machine: on a CPU, sums of matrix
    products depend on it, and a run has the same bits on every machine.
    """
    machine = machine or this_machine()
    threads = config.train.threads_per_rank
    more = machine.cores // max(1, ranks_here)
    if config.train.device == "cuda" or machine.has_gpu or more < 2 * threads:
        return ""
    return (
        f"note: {counted(ranks_here, 'rank')} with train.threads_per_rank = {threads} on "
        f"{machine.cores} cores; {more} would use them all, and can give other bits: set it before "
        "the first step"
    )


def _rank_bytes(config: RunConfig) -> int:
    """The mean memory of a rank, of the first replica of each stage, without offloaded bytes."""
    plan = plan_of(config)
    mesh, form = plan.configured_mesh, state_format(config)
    exact = config.numerics.reduction == "exact"
    away = config.offload.activations != "none"
    total = 0
    for stage in range(mesh.pipeline):
        memory = rank_memory(
            plan,
            mesh.rank(0, 0, stage),
            precision=form.precision,
            owned_bytes=form.owned_bytes,
            exact=exact,
        )
        total += memory.total - memory.activations * away
    return total // mesh.pipeline
