"""The proof of a checkpoint: the steps since an earlier one are repeated and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.checkpoint.format import name_of
from holdfast.checkpoint.stores import PathOrUrl, read_manifest
from holdfast.checkpoint.tools import Difference, diff_checkpoints
from holdfast.launch.launchers import run_local
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.files import scratch_folder
from holdfast.parallel.output import write_whole
from holdfast.trainer.config import convert_config, dump_toml, load_config
from holdfast.trainer.run import RunRequest, opened_run


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of the repetition."""

    steps: tuple[int, int]
    difference: Difference


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
    with scratch_folder() as scratch:
        source = scratch / "config.toml"
        write_whole(source, dump_toml(convert_config(after.config)).encode())
        config = load_config(
            source,
            [
                *overrides,
                f"train.stop_after={after.step}",
                "checkpoint.every=0",
                "checkpoint.path=",
                "checkpoint.memory_every=0",
            ],
        )
        root = scratch / "run"
        ranks = config.parallel.ranks
        request = RunRequest(source, config, out=root, resume=str(first), world_size=ranks)
        with opened_run(request) as opened:
            code = run_local(opened.config, opened.directory, ranks)
        if code != 0:
            raise CheckpointError(f"repeating the steps ended with exit code {code}")
        again = root / "checkpoints" / name_of(after.step)
        return Proof((before.step, after.step), diff_checkpoints(again, second))
