"""The proof of a checkpoint: the steps since an earlier one are repeated and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint.format import name_of
from holdfast.checkpoint.stores import PathOrUrl, read_manifest
from holdfast.checkpoint.tools import Difference, diff_checkpoints
from holdfast.launch.proofs.digest_comparison import Divergence, divergence
from holdfast.launch.proofs.repeat import Repeater, repeat_steps
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.files import scratch_folder
from holdfast.trainer.config import convert_config
from holdfast.trainer.reports import digests_by_step
from holdfast.trainer.run import RunDirectory


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of the repetition."""

    steps: tuple[int, int]
    difference: Difference
    where: Divergence | None
    """Where the run's digests, if it has any, part from those of the repetition."""


def prove_checkpoints(first: PathOrUrl, second: PathOrUrl, overrides: Sequence[str] = ()) -> Proof:
    """Train from `first` to the step of `second` in a scratch folder, and compare. Starts workers.

    Args:
        overrides: `section.key=value` for the configuration, e.g. another layout.
    Raises:
        CheckpointError: the checkpoints are not of one run in this order, or training failed.
    """
    before, after = read_manifest(first), read_manifest(second)
    if not before.config:
        raise CheckpointError(f"{first} holds no configuration to train with (a rebuilt manifest?)")
    if before.step >= after.step:
        raise CheckpointError(
            f"{first} is of step {before.step} and {second} of step {after.step}; A must be the "
            "earlier"
        )
    config = convert_config(after.config)
    with Repeater() as repeater, scratch_folder() as scratch:
        again = repeat_steps(
            repeater,
            config,
            first,
            after.step,
            scratch / "run",
            overrides,
            saved=False,
            other_run=False,
        )
        made = again.root / "checkpoints" / name_of(after.step)
        return Proof(
            (before.step, after.step), diff_checkpoints(made, second), _divergence(again, second)
        )


def _divergence(again: RunDirectory, second: PathOrUrl) -> Divergence | None:
    """Where the digests of the run of a checkpoint part from those of its repetition."""
    run = RunDirectory(Path(str(second)).parent.parent)
    return divergence(digests_by_step(run.digests), digests_by_step(again.digests))
