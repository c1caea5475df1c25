"""The room on this machine for the processes and the state of a run.

What is started may grow with a number of the configuration only as far as the machine allows: a
layout of a thousand ranks is planned here, and trained elsewhere. Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.plan import rank_memory
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step import plan_of, state_format

_PER_CORE = 32
"""Processes on a core: more only take turns, and heartbeats come late."""
_PROCESS_BYTES = 96 << 20
"""What a worker takes for itself, beside code that is shared and the state of the model."""
_GPU = Path("/dev/nvidiactl")


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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            memory = min(memory, int(Path(limit).read_text()))
    return Machine(cores, memory, _GPU.exists())


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
    if config.train.device == "cuda" or (config.train.device == "auto" and machine.has_gpu):
        return  # the state is in the memory of the GPUs
    needed = _rank_bytes(config) * ranks_here
    if needed > machine.memory_bytes:
        raise ConfigError(
            f"the {ranks_here} ranks here need about {needed / 2**30:,.1f} GiB, and this machine "
            f"has {machine.memory_bytes / 2**30:,.1f}; see holdfast plan: lower the model or the "
            "micro-batch, recompute or offload activations, or use more machines"
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
            plan, mesh.rank(0, 0, stage), precision=form.precision, copies=form.copies, exact=exact
        )
        total += memory.total - memory.activations * away
    return total // mesh.pipeline
