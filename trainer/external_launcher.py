"""A worker that some other launcher started: torchrun, srun, mpirun."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from holdfast.parallel.errors import ConfigError, HoldfastError
from holdfast.trainer.config import RunConfig, check_config, load_config
from holdfast.trainer.run import (
    Resume,
    RunDirectory,
    choose_root,
    lock_run,
    open_run,
    recorded_throughput,
    resolve_throughput,
)
from holdfast.trainer.world import WorldInfo

if TYPE_CHECKING:
    from torch.distributed import Store

_RUN_KEY = "run directory"
_RESTARTS_ONLY = (
    "holdfast: note: whoever started this worker restarts all of them after a loss, from the newest "
    "checkpoint; for elastic.enabled start `holdfast train` by itself, or as tasks of srun or mpirun"
)


def run_external_worker(
    config_path: Path,
    overrides: Sequence[str],
    out: Path | None,
    resume: str,
    world: WorldInfo,
    *,
    allow_change: bool = False,
) -> int:
    """Run one worker of a world that exists already; returns the process's exit code.

    Rank 0 makes the run directory and tells the others where it is.
    """
    try:
        config = load_config(config_path, overrides)
        check_config(config, world.world_size)
        if config.elastic.enabled and world.rank == 0:
            print(_RESTARTS_ONLY, file=sys.stderr, flush=True)  # noqa: T201
        # Imported here: a configuration error is told without waiting for torch.
        from torch.distributed import PrefixStore

        from holdfast.trainer.worker import connect, run_worker

        store = PrefixStore(f"attempt-{world.attempt}", connect(world))
        with contextlib.ExitStack() as held:
            if world.rank == 0:
                run = _opened_run(
                    store, held, config_path, out, resume, config, allow_change, world
                )
            else:
                run = _told_run(store)
            config = recorded_throughput(config, run.root)
            return run_worker(config, world, run, announce=True, store=store)
    except HoldfastError as error:
        if world.rank == 0:
            print(f"holdfast: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code


def _opened_run(
    store: Store,
    held: contextlib.ExitStack,
    config_path: Path,
    out: Path | None,
    resume: str,
    config: RunConfig,
    allow_change: bool,
    world: WorldInfo,
) -> RunDirectory:
    """Rank 0: make the run directory, keep it locked, and tell the others, or why there is none."""
    try:
        root = choose_root(config_path, out, config, resume, allow_change=allow_change)
        held.enter_context(lock_run(root))
        config = resolve_throughput(
            config,
            root,
            ranks_here=world.local_world_size,
            fresh=resume == "none" and not world.attempt,
            say=lambda line: print(line, flush=True),  # noqa: T201
        )
        run = open_run(root, config, resume, allow_change=allow_change)
    except HoldfastError as error:
        store.set(_RUN_KEY, json.dumps({"error": str(error)}))
        raise
    told = {"root": str(run.root.absolute()), "resume": msgspec.to_builtins(run.resume)}
    store.set(_RUN_KEY, json.dumps(told))
    return run


def _told_run(store: Store) -> RunDirectory:
    told = json.loads(store.get(_RUN_KEY))
    if "error" in told:
        raise ConfigError(told["error"])
    return RunDirectory(Path(told["root"]), msgspec.convert(told["resume"], Resume))
