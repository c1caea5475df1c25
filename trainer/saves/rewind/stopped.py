"""Steps of a run that has ended or stopped are taken back: by its checkpoints. Local.

The run goes on from the newest checkpoint that is old enough. Newer ones keep their files under
other names, and the configuration in the run's folder says without which samples it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.checkpoint.format import step_of
from holdfast.checkpoint.stores import LocalStore, readable
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import Removal, RunConfig, with_removals
from holdfast.trainer.reports import EventFile, last_step
from holdfast.trainer.run import (
    RunDirectory,
    checkpoint_root,
    forget_newer,
    note_config,
    set_aside_newer,
    unwritable,
)


def take_back_stopped(
    run: RunDirectory, config: RunConfig, steps: int, samples: Sequence[int]
) -> str:
    """Take the last steps of a run back. One process calls it, with the run's folder locked.

    Args:
        config: that of the folder.
        steps: counted back from the last line of metrics.jsonl.
        samples: the numbers of the samples without which the run goes on.
    Returns:
        What was done, for a person.
    Raises:
        ConfigError: there are fewer steps, no checkpoint is old enough, or the folder cannot be
            written.
        DataError: the data has no such sample.
    """
    if samples:
        _require_samples(config, samples)
    done = last_step(run.metrics)
    wanted = done - steps
    store = LocalStore(checkpoint_root(run.root, config))
    found = [manifest.step for _, manifest in readable(store)]
    start = max((step for step in found if step <= wanted), default=-1)
    if start < 0:
        told = ", ".join(map(str, sorted(found))) or "none"
        raise ConfigError(
            f"--steps {steps}: {run.root} has done {done} steps, and no checkpoint of step "
            f"{max(wanted, 0)} or before (it has {told}); take fewer steps back, or start over "
            "with data.without and --resume none"
        )
    try:
        moved = set_aside_newer(store.root, start)
        forget_newer(run.root, start)
        store.point_latest(next(n for n in store.names() if step_of(n) == start))
        if samples:
            removal = Removal(start=start, samples=sorted(samples))
            note_config(run, with_removals(config, [removal]))
    except OSError as error:
        raise unwritable(run.root, error) from error
    without = f" without sample {', '.join(map(str, samples))}" if samples else ""
    message = f"the run goes on from its checkpoint of step {start}{without}"
    events = EventFile(run.events)
    events.append(
        "rewound",
        step=start,
        by="hand",
        steps=done - start,
        samples=list(samples),
        message=message,
    )
    events.close()
    aside = f"; set aside: {', '.join(moved)}" if moved else ""
    return f"{message}, {done - start} steps before its last{aside}"


def _require_samples(config: RunConfig, samples: Sequence[int]) -> None:
    from holdfast.trainer.step import open_split  # which imports torch

    open_split(config, "train").without([(0, samples)])
