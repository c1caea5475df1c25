"""`holdfast bisect A B`: the first step, operation and element in which two runs differ.

Their digests name the step; only that step is trained again, by the configuration of each, from the
nearest checkpoint. In exact mode one process has the bits of any layout, so that both repetitions
have the same operations, and the first that differs is where the runs part. What neither repetition
has was no matter of settings: a machine computed it wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import torch

from holdfast.checkpoint.format import name_of
from holdfast.checkpoint.tools import TensorDifference, diff_checkpoints
from holdfast.launch.proofs.digest_comparison import Divergence, common_steps, divergence
from holdfast.launch.proofs.operation_comparison import (
    ElementDifference,
    OperationDifference,
    first_operation,
    first_value,
)
from holdfast.launch.proofs.repeat import (
    Repeater,
    alone,
    config_of_step,
    digests_of,
    newest_checkpoint,
    recorded_config,
    repeat_steps,
)
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.files import scratch_folder
from holdfast.trainer.check import operations_file
from holdfast.trainer.config import RunConfig, flat_keys
from holdfast.trainer.reports import StepDigests
from holdfast.trainer.run import RunDirectory, read_events
from holdfast.trainer.step import layers_of_config, open_split, training_batch

_OF_THE_BITS = ("model.", "data.", "train.", "optimizer.", "numerics.")
_NOT_OF_THE_BITS = ("train.stop_after", "train.eval_", "train.device", "data.validation")


@dataclass(frozen=True, slots=True)
class Side:
    """One of two runs that are compared."""

    name: str
    run: RunDirectory
    config: RunConfig
    digests: dict[int, StepDigests]

    @staticmethod
    def of(name: str, run: RunDirectory) -> Side:
        """Raises ConfigError: it is no run, or has no digests."""
        return Side(name, run, recorded_config(run), digests_of(run))


@dataclass(frozen=True, slots=True)
class Bisection:
    """The result of a comparison."""

    steps: tuple[int, ...]
    """Those of which both have digests."""
    where: Divergence | None
    """None: all of these are the same."""
    layers: tuple[str, ...] = ()
    """The names of the layers that differ."""
    settings: tuple[str, ...] = ()
    """The keys that differ and affect bits, with both values."""
    token: str = ""
    """The first token of the step that differs, for a person; empty: the data is the same."""
    reproduced: tuple[bool, bool] | None = None
    """Whether the repetition in each setting has the digests of its run; None: none was made."""
    operation: OperationDifference | None = None
    output: OperationDifference | None = None
    """Where the operations are others: the first module whose result differs."""
    element: ElementDifference | None = None
    tensor: TensorDifference | None = None
    """After the update of the step, the first tensor that differs."""
    repeated: int = 0
    """The steps that were trained again, over both settings."""
    note: str = ""
    """Why the step was not trained again, if it was not for another reason than being asked."""

    @property
    def equal(self) -> bool:
        return self.where is None


@dataclass(slots=True)
class Repetition:
    """Steps of a run that were trained again."""

    digests: dict[int, StepDigests] = field(default_factory=dict)
    runs: dict[int, RunDirectory] = field(default_factory=dict)
    """By step, the run that made it: a new one where the configuration changed."""

    def checkpoint(self, step: int) -> Path:
        """The state after a step."""
        return self.runs[step].root / "checkpoints" / name_of(step)


@dataclass(slots=True)
class _Work:
    """The folder of the repetitions, and what they cost."""

    repeater: Repeater
    folder: Path
    overrides: tuple[str, ...]
    repeated: int = 0
    tried: int = 0

    def repeat(
        self,
        side: Side,
        start: tuple[int, Path | None],
        until: int,
        recorded: Sequence[int] = (),
        values: Sequence[int] = (),
    ) -> Repetition:
        """Train again by the configuration that a run had then; see `repeat_steps`."""
        found = Repetition()
        self.repeated += until - start[0]
        while True:
            self.tried += 1
            config, last = config_of_step(side.run, side.config, start[0] + 1)
            end = until if last is None else min(until, last)
            settings = (*alone(config), *self.overrides)
            folder = self.folder / f"{side.name}-{self.tried}"
            run = repeat_steps(
                self.repeater,
                config,
                start[1],
                end,
                folder,
                settings,
                recorded=recorded,
                values=values,
            )
            found.digests |= digests_of(run)
            found.runs |= dict.fromkeys(range(start[0] + 1, end + 1), run)
            if end == until:
                return found
            start = end, run.root / "checkpoints" / name_of(end)


def bisect_runs(
    first: RunDirectory,
    second: RunDirectory,
    overrides: Sequence[str] = (),
    *,
    repeats: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Bisection:
    """Find where two runs part. Starts workers.

    Args:
        overrides: `section.key=value` for the repetitions, e.g. a layout that fits.
        repeats: whether the step is trained again.
        say: told what is done.
    Raises:
        ConfigError: one is no run with digests, or they have no step in common.
        CheckpointError: the step cannot be repeated.
    """
    a, b = Side.of("A", first), Side.of("B", second)
    steps = common_steps(a.digests, b.digests)
    if not steps:
        raise ConfigError(
            f"A has digests of steps {min(a.digests)} to {max(a.digests)} and B of {min(b.digests)}"
            f" to {max(b.digests)}; they have no step in common to compare"
        )
    where = divergence(a.digests, b.digests) or _at_the_end(a, b, steps)
    found = Bisection(tuple(steps), where)
    if where is None:
        return found
    found = replace(found, settings=tuple(_differing_settings(a, b, where.step)))
    if not repeats:
        return _named(found, a)
    with Repeater() as repeater, scratch_folder() as folder:
        work = _Work(repeater, folder, tuple(overrides))
        if not where.is_exact:
            say(f"steps {where.equal_until} to {where.step} are trained again, to find which it is")
            where = _narrowed(work, a, b, where)
            settings = tuple(_differing_settings(a, b, where.step))
            found = replace(found, where=where, settings=settings)
        found = replace(found, token=_other_token(a, b, where.step))
        say(f"step {where.step} is trained again by the configuration of each run")
        found = _repeated(work, a, b, found, where)
        found = replace(found, repeated=work.repeated)
    return _named(found, a)


def _at_the_end(a: Side, b: Side, steps: Sequence[int]) -> Divergence | None:
    """The update of the last step, if the parameters after it differ."""
    last = steps[-1]
    digests = {_final_digest(side, last) for side in (a, b)} - {""}
    return Divergence(last, "update", (), last) if len(digests) > 1 else None


def _final_digest(side: Side, step: int) -> str:
    ended = [event for event in read_events(side.run.events) if event["event"] == "run_finished"]
    if ended and ended[-1].get("steps") == step:
        return str(ended[-1].get("parameter_digest", ""))
    return ""


def _named(found: Bisection, side: Side) -> Bisection:
    names = [layer.name for layer in layers_of_config(side.config)]
    numbers = found.where.layers if found.where else ()
    return replace(
        found,
        layers=tuple(names[n] if n < len(names) else f"layer {n}" for n in numbers),
    )


def _differing_settings(a: Side, b: Side, step: int) -> Iterator[str]:
    """The keys that bits depend on and that differed in a step."""
    configs = [config_of_step(side.run, side.config, step)[0] for side in (a, b)]
    mine, others = (flat_keys(msgspec.to_builtins(config)) for config in configs)
    for key in sorted(mine.keys() | others.keys()):
        if not key.startswith(_OF_THE_BITS) or key.startswith(_NOT_OF_THE_BITS):
            continue
        if mine.get(key) != others.get(key):
            yield f"{key} = {mine.get(key)!r} in A and {others.get(key)!r} in B"


def _other_token(a: Side, b: Side, step: int) -> str:
    """The first token of a step, counted from 1, that the data of two runs has differently."""
    configs = [config_of_step(side.run, side.config, step)[0] for side in (a, b)]
    data = [open_split(config, "train") for config in configs]
    train = [config.train for config in configs]
    sizes = {(t.batch_of(step - 1), t.micro_batch, t.length_of(step - 1)) for t in train}
    if len(sizes) > 1:
        return "batches are of different sizes"
    ((batch, size, _),) = sizes
    for micro_batch in range(batch // size):
        read = [
            training_batch(t, own, step - 1, micro_batch)
            for t, own in zip(train, data, strict=True)
        ]
        for kind in ("tokens", "targets"):
            x, y = (getattr(own, kind) for own in read)
            if x.shape != y.shape:
                return f"the {kind} of micro-batch {micro_batch} are of different shapes"
            places = (x != y).nonzero()
            if len(places):
                row, column = places[0].tolist()
                sample = train[0].samples_before(step - 1) + micro_batch * size + row
                return (
                    f"sample {sample} (sequence {row} of micro-batch {micro_batch}), place "
                    f"{column} of its {kind}: {int(x[row, column])} in A and "
                    f"{int(y[row, column])} in B"
                )
    return ""


# The repetitions.


def _start(work: _Work, a: Side, b: Side, done: int) -> tuple[int, Path | None]:
    """The state after `done` steps, which both runs had: a checkpoint, or the steps up to it again.

    Raises:
        CheckpointError: neither configuration gives it.
    """
    if not done:
        return 0, None
    found = [newest_checkpoint(side.run, side.config, done) for side in (a, b)]
    newest = max((place for place in found if place is not None), default=(0, None))
    if newest[0] == done:
        return newest
    for side in (a, b):
        again = work.repeat(side, newest, done)
        if all(side.digests.get(step, found) == found for step, found in again.digests.items()):
            return done, again.checkpoint(done)
    raise CheckpointError(
        f"steps {newest[0] + 1} to {done}, in which the runs are equal, have other bits when they "
        "are trained again in this layout; give that of the runs with --set"
    )


def _narrowed(work: _Work, a: Side, b: Side, where: Divergence) -> Divergence:
    """The step of an update that differs, from digests of every step since the last equal ones."""
    begin = max(0, where.equal_until - 1)
    start = _start(work, a, b, begin)
    until = min(where.step + 1, a.config.train.steps)
    again = [work.repeat(side, start, until).digests for side in (a, b)]
    found = divergence(*again)
    if found is None or not found.is_exact:
        raise CheckpointError(
            f"the runs differ somewhere in steps {where.equal_until} to {where.step}, but not when "
            "these are trained again: what differed was no matter of settings; log.digests_every "
            "= 1 would name the step"
        )
    return found


def _repeated(work: _Work, a: Side, b: Side, found: Bisection, where: Divergence) -> Bisection:
    """The comparison of the step that differs, trained again by both configurations."""
    step, is_update = where.step, where.kind == "update"
    begin = step - 1
    if where.kind == "start" and step > 1:
        return replace(found, note=f"the runs differ before step {step}, the first that both have")
    until = min(step + is_update, a.config.train.steps, b.config.train.steps)
    start = _start(work, a, b, begin)
    made, same = [], []
    for side in (a, b):
        made.append(work.repeat(side, start, until, recorded=[step]))
        known = {n: side.digests[n] for n in range(step, until + 1) if n in side.digests}
        same.append(all(made[-1].digests[n] == digests for n, digests in known.items()))
    found = replace(found, reproduced=(same[0], same[1]))
    files = [operations_file(own.runs[step].trace, step, 0) for own in made]
    if all(path.exists() for path in files):
        operation = first_operation(*files)
        output = None
        if operation is not None and operation.is_other_program:
            output = first_operation(*files, only_outputs=True)
        found = replace(found, operation=operation, output=output)
        if (valued := output or operation) is not None and not valued.is_other_program:
            found = replace(found, element=_element(work, a, b, start, step, valued))
    if found.operation is None:
        checkpoints = [own.checkpoint(step) for own in made]
        if all(path.is_dir() for path in checkpoints):
            values = diff_checkpoints(*checkpoints).values
            found = replace(found, tensor=next(iter(values), None))
    return found


def _element(
    work: _Work,
    a: Side,
    b: Side,
    start: tuple[int, Path | None],
    step: int,
    operation: OperationDifference,
) -> ElementDifference | None:
    again = [
        work.repeat(side, start, step, recorded=[step], values=[number]).runs[step]
        for side, number in zip((a, b), operation.numbers, strict=True)
    ]
    files = [operations_file(run.trace, step, 0).with_suffix(".safetensors") for run in again]
    if not all(path.exists() for path in files):
        return None
    with torch.no_grad():
        return first_value(files[0], files[1], operation.numbers)
