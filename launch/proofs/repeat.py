"""Steps of a run, trained again from a checkpoint in a folder of their own. Starts workers."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import msgspec

from holdfast.checkpoint.format import step_of
from holdfast.checkpoint.stores import LocalStore, PathOrUrl
from holdfast.launch.launchers import run_local
from holdfast.launch.processes import append_output, fork_child
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.output import exit_code_of, write_whole
from holdfast.parallel.reading import decode_json, read_regular
from holdfast.trainer.config import (
    EVERY_CHANGE,
    RunConfig,
    convert_config,
    dump_toml,
    load_config,
)
from holdfast.trainer.reports import StepDigests, digests_by_step
from holdfast.trainer.run import RunDirectory, RunRequest, checkpoint_root, opened_run

_ALONE = (
    *(f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "data", "context", "expert")),
    "parallel.virtual=1",
    "parallel.schedule=1f1b",
    "parallel.stretches=1",
    "parallel.blocks_per_chunk=[]",
    "parallel.expert_replicas=1",
    "parallel.shard=optimizer",
    "parallel.shard_group=0",
    "parallel.backend=auto",
    "offload.activations=none",
)
"""The layout of one process."""
_LONGEST_REQUEST = 1 << 20
_LONGEST_ANSWER = 64
_APART = (
    "elastic.enabled=false",
    "elastic.chaos=[]",
    "checkpoint.path=",
    "checkpoint.memory_every=0",
    "checkpoint.every_seconds=0",
    "checkpoint.keep=0",
    "checkpoint.keep_best=0",
    "log.tensorboard=false",
    "log.trace_steps=[]",
    "log.digests_every=1",
    "train.eval_every=0",
)
"""What keeps the repetition from all that is outside of its folder, and has every step digested."""


def alone(config: RunConfig) -> list[str]:
    """The keys that lay a run out on one process with the same bits, as far as there is a promise.

    In fast mode bits depend on the layout, which then stays.
    """
    if config.numerics.reduction != "exact":
        return []
    return [*_ALONE, f"numerics.tensor_shards={config.tensor_parts}"]


def recorded_config(run: RunDirectory) -> RunConfig:
    """The configuration of a run.

    Raises:
        ConfigError: the folder is none of a run.
    """
    if not run.config.is_file():
        raise ConfigError(f"{run.root} has no config.toml, so it is not the folder of a run")
    return load_config(run.config, [])


def digests_of(run: RunDirectory) -> dict[int, StepDigests]:
    """The digests of a run's steps.

    Raises:
        ConfigError: it has none.
    """
    found = digests_by_step(run.digests)
    if not found:
        raise ConfigError(
            f"{run.root} has no digests.jsonl with steps, by which runs are compared; train with "
            "log.digests_every = 1"
        )
    return found


def config_of_step(run: RunDirectory, config: RunConfig, step: int) -> tuple[RunConfig, int | None]:
    """The configuration by which a run made a step, counted from 1, as its checkpoints tell.

    Args:
        config: that of its folder, which is of its newest start.
    Returns:
        The configuration, and the last step for which it is known to hold; None: it holds from
        here on.
    """
    store = LocalStore(checkpoint_root(run.root, config))
    for name in store.names():
        found = step_of(name)
        if found is not None and found >= step:
            saved = store.manifest(name).config
            return (convert_config(saved) if saved else config), found
    return config, None


def newest_checkpoint(run: RunDirectory, config: RunConfig, step: int) -> tuple[int, Path] | None:
    """The newest checkpoint of a run after at most `step` steps; None: it has none."""
    store = LocalStore(checkpoint_root(run.root, config))
    steps = [(n, store.path(name)) for name in store.names() if (n := step_of(name)) is not None]
    return max((found for found in steps if found[0] <= step), default=None)


class Repeater:
    """A child of this process that trains steps again, each time in a process of its own.

    It has all that this process has imported, torch included, and no thread, so each repetition is
    forked from it: this process may have threads by then. It ends with the block, and with this
    process.
    """

    def __enter__(self) -> Repeater:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = fork_child(partial(_serve, requests, answers, (self._requests, self._answers)))
        os.close(requests)
        os.close(answers)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._requests)
        os.close(self._answers)
        os.waitpid(self._pid, 0)

    def train(self, request: TrainingRequest) -> int:
        """Train as requested. Returns the exit code."""
        os.write(self._requests, msgspec.json.encode(request) + b"\n")
        answer = os.read(self._answers, _LONGEST_ANSWER)
        return int(answer) if answer else 1


class TrainingRequest(msgspec.Struct, frozen=True):
    """A run that a `Repeater` trains."""

    source: str
    """The file of its configuration."""
    settings: list[str]
    root: str
    resume: str
    other_run: bool
    log: str
    """The file for what it says."""


def _serve(requests: int, answers: int, of_others: tuple[int, ...]) -> int:
    """Train one request after another, until there are no more. Returns the exit code."""
    for descriptor in of_others:
        os.close(descriptor)
    with os.fdopen(requests, "rb") as lines:
        while line := lines.readline(_LONGEST_REQUEST):
            pid = fork_child(partial(_train, decode_json(line, TrainingRequest)))
            status = os.waitpid(pid, 0)[1]
            os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return 0


def _train(request: TrainingRequest) -> int:
    append_output(Path(request.log))
    return exit_code_of(partial(_run, request))


def _run(request: TrainingRequest) -> int:
    source = Path(request.source)
    config = load_config(source, request.settings)
    ranks = config.parallel.ranks
    allowed = EVERY_CHANGE if request.other_run else ()
    asked = RunRequest(
        source, config, Path(request.root), request.resume, allowed, world_size=ranks
    )
    with opened_run(asked) as opened:
        return run_local(opened.config, opened.directory, ranks)


def repeat_steps(
    repeater: Repeater,
    config: RunConfig,
    start: PathOrUrl | None,
    until: int,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    saved: bool = True,
    other_run: bool = True,
    recorded: Collection[int] = (),
    values: Collection[int] = (),
) -> RunDirectory:
    """Train from a checkpoint until `until` steps are done. Starts workers.

    Args:
        start: the checkpoint; None: the beginning of the run.
        folder: a new one, for the run.
        overrides: `section.key=value`, e.g. another layout.
        saved: whether each step is saved, and not the last alone.
        other_run: whether the checkpoint may be one of a run with other settings.
        recorded: the steps whose operations are written.
        values: the operations whose values are written.
    Raises:
        CheckpointError: training failed.
    """
    folder.mkdir(parents=True)
    source = folder / "config.toml"
    write_whole(source, dump_toml(config).encode())
    root = folder / "run"
    settings = (
        *_APART,
        f"checkpoint.every={int(saved)}",
        *overrides,
        f"train.stop_after={until}",
        f"log.operation_steps={sorted(recorded)}",
        f"log.operation_values={sorted(values)}",
    )
    log = folder / "output.log"
    code = repeater.train(
        TrainingRequest(
            source=str(source),
            settings=list(settings),
            root=str(root),
            resume="none" if start is None else str(start),
            other_run=other_run,
            log=str(log),
        )
    )
    if code:
        said = read_regular(log).decode(errors="replace").strip().splitlines()
        raise CheckpointError(
            f"repeating the steps until {until} ended with exit code {code}: "
            + (" / ".join(said[-3:]) or "it said nothing")
        )
    return RunDirectory(root)
