"""A worker that some other launcher started: torchrun, srun, mpirun."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.parallel.errors import ConfigError, HoldfastError
from holdfast.trainer.config import RunConfig, check_config, load_config
from holdfast.trainer.run_directory import RunDirectory, choose_root, open_run
from holdfast.trainer.world import WorldInfo

if TYPE_CHECKING:
    from torch.distributed import Store

_RUN_KEY = "run directory"


def enter(
    config_path: Path, overrides: Sequence[str], out: Path | None, resume: str, world: WorldInfo
) -> int:
    """Run one worker of a world that exists already; returns the process's exit code.

    Rank 0 makes the run directory and tells the others where it is.
    """
    try:
        config = load_config(config_path, overrides)
        check_config(config, world.world_size)
        # Imported here: a configuration error is told without waiting for torch.
        from torch.distributed import PrefixStore

        from holdfast.trainer.worker import connect, run_worker

        store = PrefixStore(f"attempt-{world.attempt}", connect(world))
        run = _agreed_run(store, world.rank, config_path, out, resume, config)
    except HoldfastError as error:
        if world.rank == 0:
            print(f"holdfast: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code
    return run_worker(config, world, run, announce=True, store=store)


def _agreed_run(
    store: Store, rank: int, config_path: Path, out: Path | None, resume: str, config: RunConfig
) -> RunDirectory:
    """Rank 0's run directory, or its reason for not having one."""
    if rank == 0:
        try:
            run = open_run(choose_root(config_path, out), config, resume)
        except HoldfastError as error:
            store.set(_RUN_KEY, json.dumps({"error": str(error)}))
            raise
        store.set(_RUN_KEY, json.dumps({"root": str(run.root.absolute())}))
        return run
    told = json.loads(store.get(_RUN_KEY))
    if "error" in told:
        raise ConfigError(told["error"])
    return RunDirectory(Path(told["root"]))
