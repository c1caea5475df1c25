"""A worker that another launcher started: torchrun, srun, mpirun."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from holdfast.parallel.errors import ConfigError, HoldfastError
from holdfast.parallel.output import tell
from holdfast.trainer.config import RunConfig, check_config, with_removals
from holdfast.trainer.run import (
    OpenedRun,
    RunAnswer,
    RunRequest,
    opened_run,
    recorded_throughput,
    told_run,
)
from holdfast.trainer.terms import TermsDiffer
from holdfast.trainer.worlds import WorldInfo

if TYPE_CHECKING:
    from torch.distributed import Store

_RUN_KEY = "run directory"
_RESTARTS_ONLY = (
    "holdfast: note: the launcher of this worker restarts all workers after a loss, from the "
    "newest "
    "checkpoint; for elastic.enabled start `holdfast train` by itself, or as tasks of srun or "
    "mpirun"
)


def run_external_worker(request: RunRequest, world: WorldInfo) -> int:
    """Run one worker of an existing world. Returns the process's exit code.

    Rank 0 opens the run and tells the others its folder.
    """
    config = request.config
    if world.world_size == 1:
        world = world.with_own_store()
    try:
        _check(config, world)
        if config.elastic.enabled and world.rank == 0:
            tell(_RESTARTS_ONLY)
        # Imported here, so that a configuration error is reported without waiting for torch.
        from torch.distributed import PrefixStore

        from holdfast.trainer.worker import connect, meet, require_one_run, run_worker

        store = PrefixStore(f"attempt-{world.attempt}", connect(world))
        meet(store, world)
        # Before the run is opened: what is refused changes nothing on the disk.
        require_one_run(config, world, store)
        with contextlib.ExitStack() as held:
            if world.rank == 0:
                here = replace(request, ranks_here=world.local_world_size, attempt=world.attempt)
                opened = _announced(here, store, held)
            else:
                try:
                    run, _ = told_run(store.get(_RUN_KEY))
                except ConfigError as error:
                    if error.__cause__ is not None:
                        raise
                    return error.exit_code  # rank 0 has said it
                resolved = recorded_throughput(config, run.root)
                opened = OpenedRun(with_removals(resolved, run.resume.removals), run)
            return run_worker(opened.config, world, opened.directory, announce=True, store=store)
    except TermsDiffer as error:
        if not world.local_rank:  # every rank has the same lines
            tell(f"holdfast: {error}")
        return error.exit_code
    except HoldfastError as error:
        tell(f"holdfast: rank {world.rank}: {error}" if world.rank else f"holdfast: {error}")
        return error.exit_code


def _check(config: RunConfig, world: WorldInfo) -> None:
    """Raise ConfigError if the configuration is not one for the world."""
    try:
        check_config(config, world.world_size)
    except ConfigError as error:
        if world.world_size == config.parallel.ranks:
            raise
        raise ConfigError(
            f"{error}; the number is that of a launcher's variables: unset RANK and WORLD_SIZE, or "
            "OMPI_*, PMI_* and SLURM_*, if they are left over"
        ) from error


def _announced(request: RunRequest, store: Store, held: contextlib.ExitStack) -> OpenedRun:
    """As rank 0, open and lock the run, and tell the others its folder or the error."""
    try:
        opened = held.enter_context(opened_run(request))
    except HoldfastError as error:
        store.set(_RUN_KEY, msgspec.json.encode(RunAnswer(error=str(error))).decode())
        raise
    run = opened.directory
    answer = RunAnswer(root=str(run.root.absolute()), resume=run.resume)
    store.set(_RUN_KEY, msgspec.json.encode(answer).decode())
    return opened
