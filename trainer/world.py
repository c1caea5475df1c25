"""Where this process stands among the workers of a run, and how that is read from the environment."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.parallel.errors import ConfigError


@dataclass(frozen=True, slots=True)
class WorldInfo:
    """What a launcher tells a worker."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    store_host: str
    store_port: int
    store_is_server: bool
    """Whether this worker hosts the rendezvous store itself, for lack of an agent that does."""
    attempt: int = 0
    """How often a launcher has restarted the workers; keeps their rendezvous apart."""
    job: str = ""
    """Names the launcher's job where its tasks may be agents; empty under torchrun, which has its own."""


def local_world(rank: int, world_size: int, port: int = 0) -> WorldInfo:
    """The world of workers that share one machine and a store that somebody else hosts."""
    return WorldInfo(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        node=0,
        store_host="127.0.0.1",
        store_port=port,
        store_is_server=False,
    )


def world_from_environment(environment: Mapping[str, str]) -> WorldInfo | None:
    """The world that torchrun, Slurm or an MPI launcher describes; None if there is none.

    RANK and WORLD_SIZE come first, then SLURM_*, then OMPI_* and PMI_*. MASTER_ADDR and MASTER_PORT,
    where they are set, name the store in every case.

    Raises:
        ConfigError: a description that is incomplete or not a number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _torchrun(environment)
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return _slurm(environment)
    if "OMPI_COMM_WORLD_RANK" in environment or "PMI_RANK" in environment:
        return _mpi(environment)
    return None


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(
            f"{name} = {text!r} in the environment is not a number; the launcher should set it"
        ) from None


def _torchrun(environment: Mapping[str, str]) -> WorldInfo:
    rank = _number(environment, "RANK")
    world_size = _number(environment, "WORLD_SIZE")
    by_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return WorldInfo(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK", rank),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", world_size),
        node=_number(environment, "GROUP_RANK", 0),
        store_host=environment.get("MASTER_ADDR", "127.0.0.1"),
        store_port=_number(environment, "MASTER_PORT", 29500),
        store_is_server=rank == 0 and not by_agent,
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _slurm(environment: Mapping[str, str]) -> WorldInfo:
    rank = _number(environment, "SLURM_PROCID")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0]
    return WorldInfo(
        rank=rank,
        world_size=_number(
            environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1)
        ),
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        local_world_size=int(re.match(r"\d+", per_node)[0]),  # pyrefly: ignore
        node=_number(environment, "SLURM_NODEID", 0),
        store_host=environment.get("MASTER_ADDR") or first_host(nodes) or "127.0.0.1",
        store_port=_number(
            environment, "MASTER_PORT", _port_of(environment.get("SLURM_JOB_ID", "0"))
        ),
        store_is_server=rank == 0,
        attempt=_number(environment, "SLURM_RESTART_COUNT", 0),
        job=f"slurm-{environment.get('SLURM_JOB_ID', '0')}-{environment['SLURM_STEP_ID']}",
    )


def _mpi(environment: Mapping[str, str]) -> WorldInfo:
    open_mpi = "OMPI_COMM_WORLD_RANK" in environment
    prefix = "OMPI_COMM_WORLD_" if open_mpi else "PMI_"
    rank, world_size = _number(environment, f"{prefix}RANK"), _number(environment, f"{prefix}SIZE")
    local = "OMPI_COMM_WORLD_LOCAL_" if open_mpi else "MPI_LOCAL"
    local_world_size = _number(
        environment, f"{local}SIZE" if open_mpi else "MPI_LOCALNRANKS", world_size
    )
    host = environment.get("MASTER_ADDR")
    if host is None:
        if local_world_size != world_size:
            raise ConfigError(
                "MASTER_ADDR is not set, and the MPI job spans several machines; export it with the "
                "name of the first one (mpirun -x MASTER_ADDR=...)"
            )
        host = "127.0.0.1"
    job = environment.get("PMIX_NAMESPACE") or environment.get("PMI_JOBID") or "0"
    return WorldInfo(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environment, f"{local}RANK" if open_mpi else "MPI_LOCALRANKID", rank),
        local_world_size=local_world_size,
        node=_number(environment, "OMPI_COMM_WORLD_NODE_RANK", 0) if not open_mpi else 0,
        store_host=host,
        store_port=_number(environment, "MASTER_PORT", _port_of(job)),
        store_is_server=rank == 0,
        job="mpi-" + re.sub(r"[^\w.-]", "-", job),
    )


def _port_of(job: str) -> int:
    """A port that all workers of a job agree on: 20000 to 29999, below the ephemeral range."""
    number = int(job) if job.isdigit() else zlib.crc32(job.encode())
    return 20000 + number % 10000


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list: `gpu[003-006,9],cpu1` begins with gpu003."""
    matched = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return "".join(part or "" for part in matched.groups()) if matched else ""
