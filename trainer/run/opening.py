"""The opening sequence of a run, shared by every command that trains.

Read, check, choose a folder, lock it, resolve throughput, make it.

Local, in the one process that opens the run; needs no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.parallel.files import sweep_scratch, torch_caches_in
from holdfast.parallel.output import say
from holdfast.trainer.config import (
    RunConfig,
    check_config,
    config_notes,
    load_config,
    with_removals,
)
from holdfast.trainer.data import corpus_notes
from holdfast.trainer.run.claim import claimed_checkpoints
from holdfast.trainer.run.identity import open_identity
from holdfast.trainer.run.initial_weights import take_first_weights
from holdfast.trainer.run.machine import idle_cores_note, require_room
from holdfast.trainer.run.memory_copies import held_memory, require_one_machine, sweep_memory
from holdfast.trainer.run.process_heap import prepare_heap
from holdfast.trainer.run.run_directory import RunDirectory
from holdfast.trainer.run.run_folder import choose_root, locked_run, open_run
from holdfast.trainer.run.throughput import resolve_throughput


@dataclass(frozen=True, slots=True)
class RunRequest:
    """The run that a command asks for, and the steps of the opening that it leaves out."""

    path: Path
    """The file of the configuration; a new folder below runs/ gets its name."""
    config: RunConfig
    out: Path | None = None
    """The run's folder; None: one below runs/ is chosen."""
    resume: str = "auto"
    """"auto", "best", "none" or the path of a checkpoint."""
    allow_change: tuple[str, ...] = ()
    """The keys that may differ from the checkpoint's though they must match."""
    world_size: int | None = None
    """The number of workers; None: it is not checked."""
    ranks_here: int = 0
    """The workers of this machine, as many of which measure its throughput at once; 0: none."""
    attempt: int = 0
    """How often a launcher has restarted the workers; only the first attempt starts over."""


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A run whose folder exists and is locked."""

    config: RunConfig
    """The resolved configuration, which the workers use and the folder keeps."""
    directory: RunDirectory


def load_run_config(
    path: Path, overrides: Sequence[str], *, workers: int | None = None
) -> RunConfig:
    """Read a run's configuration; restart the process if its run needs a compact heap.

    It is called once, before a command does anything else.

    Args:
        workers: see `load_config`.
    Raises:
        ConfigError: the configuration cannot be read, or breaks a rule.
    """
    config = load_config(path, overrides, workers=workers)
    prepare_heap(config)
    return config


@contextlib.contextmanager
def opened_run(request: RunRequest) -> Iterator[OpenedRun]:
    """Open the requested run; it stays locked for the duration of the block.

    Lines about the corpus and measured throughput are printed.

    Raises:
        ConfigError: the tokenizer, the number of workers, the folder or the checkpoint does not
            fit; the machine has no room for its ranks; another process works on the run; the
            checkpoints are another run's, or a part of them is lost; the throughput cannot be
            measured.
    """
    config, resume, allow_change = request.config, request.resume, request.allow_change
    if request.world_size is not None:
        check_config(config, request.world_size)
    if request.ranks_here:
        require_one_machine(config, request.ranks_here)
        require_room(config, request.ranks_here)
    for note in (*config_notes(config), *corpus_notes(config.data, config.model.vocab)):
        say(note)
    root = choose_root(request.path, request.out, config, resume, allow_change=allow_change)
    with contextlib.ExitStack() as held:
        held.enter_context(locked_run(root))
        identity, notes = open_identity(root)
        sweep_scratch()
        notes += tuple(
            f"removed the copies in memory of {path}, which is gone" for path in sweep_memory()
        )
        make = config.checkpoint.memory_every > 0
        held.enter_context(held_memory(root, identity, make=make))
        notes += held.enter_context(claimed_checkpoints(root, identity, config, resume))
        if request.ranks_here:
            config = resolve_throughput(
                config,
                root,
                ranks_here=request.ranks_here,
                fresh=resume == "none" and not request.attempt,
                say=say,
            )
        if resume in ("auto", "none"):
            take_first_weights(root, config, say, allow_change=allow_change)
        run = open_run(root, config, resume, allow_change=allow_change, notes=notes)
        if request.ranks_here and not run.resume.candidates:
            note = idle_cores_note(config, request.ranks_here)
            if note:
                say(note)
        if config.train.compile:
            say(
                "compiling regions of the model before the first step: up to a minute, or seconds "
                "where it has been done before"
            )
        if not config.train.compile:  # compiled code serves other runs of this machine too
            held.enter_context(torch_caches_in(run.log(0).parent))
        yield OpenedRun(with_removals(config, run.resume.removals), run)


@contextlib.contextmanager
def at_rest(root: Path, config: RunConfig) -> Iterator[None]:
    """Keep a run from going on during the block, which changes what it goes on from.

    Args:
        config: that of its folder.
    Raises:
        ConfigError: the run is under way, or the folder or that of its checkpoints is no run's,
            another run's, or cannot be written.
    """
    with locked_run(root):
        identity, _ = open_identity(root)
        with claimed_checkpoints(root, identity, config, "auto"):
            yield
