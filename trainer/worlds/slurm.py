"""Slurm's srun: one process per task of a step."""

from __future__ import annotations

import re

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.worlds.launcher import Environment, Launcher, first_host, port_of
from holdfast.trainer.worlds.world import WorldInfo


def _read(found: Environment) -> WorldInfo:
    rank = found.number("SLURM_PROCID")
    job = found.text("SLURM_JOB_ID", default="0")
    nodes = found.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    return WorldInfo(
        rank=rank,
        world_size=found.number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1),
        local_rank=found.number("SLURM_LOCALID", default=0),
        local_world_size=_tasks_here(found),
        node=found.number("SLURM_NODEID", default=0),
        store_host=found.text("MASTER_ADDR") or first_host(nodes) or "127.0.0.1",
        store_port=found.port(port_of(job)),
        store_is_server=rank == 0,
        attempt=found.number("SLURM_RESTART_COUNT", default=0),
        job=f"slurm-{job}-{found.variables['SLURM_STEP_ID']}",
    )


def _tasks_here(found: Environment) -> int:
    """The tasks of the first node: `2(x3),1` begins with 2."""
    text = found.text("SLURM_STEP_TASKS_PER_NODE", default="1")
    matched = re.match(r"\d+", text)
    if matched is None:
        raise ConfigError(
            f"{found.launcher}, but SLURM_STEP_TASKS_PER_NODE = {text!r} does not begin with a "
            "number; the launcher should set it"
        )
    return int(matched[0])


SLURM = Launcher("Slurm", ("SLURM_PROCID", "SLURM_STEP_ID"), _read)
