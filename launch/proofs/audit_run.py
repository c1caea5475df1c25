"""`holdfast audit RUN --steps A:B`: steps of a run are trained again, and compared by digests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from holdfast.launch.proofs.digest_comparison import Divergence, divergence
from holdfast.launch.proofs.repeat import (
    Repeater,
    alone,
    digests_of,
    newest_checkpoint,
    recorded_config,
    repeat_steps,
)
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import scratch_folder
from holdfast.trainer.reports import broken_links, read_digests
from holdfast.trainer.run import RunDirectory


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit."""

    steps: tuple[int, int]
    start: int
    """The step of the checkpoint that it began from; 0: the beginning."""
    compared: int
    """The steps that were compared."""
    broken: tuple[int, ...]
    """The steps of the whole run whose line does not follow from the one before."""
    where: Divergence | None
    chain: str
    """The chain of the run after the last of the steps."""

    @property
    def confirmed(self) -> bool:
        return self.where is None and not self.broken


def audit_run(run: RunDirectory, first: int, last: int, overrides: Sequence[str] = ()) -> Audit:
    """Train steps `first` to `last`, counted from 1, again, and compare. Starts workers.

    Args:
        overrides: `section.key=value`, e.g. another layout; by default it is one process.
    Raises:
        ConfigError: the run has no digests of these steps.
        CheckpointError: they cannot be trained again.
    """
    config, digests = recorded_config(run), digests_of(run)
    wanted = {step: digests[step] for step in digests if first <= step <= last}
    if not 1 <= first <= last or last not in digests:
        raise ConfigError(
            f"--steps {first}:{last}: {run.root} has digests of steps {min(digests)} to "
            f"{max(digests)}"
        )
    start = newest_checkpoint(run, config, first - 1) or (0, None)
    with Repeater() as repeater, scratch_folder() as folder:
        again = repeat_steps(
            repeater,
            config,
            start[1],
            last,
            folder / "run",
            [*alone(config), *overrides],
            saved=False,
        )
        found = divergence(wanted, digests_of(again))
    lines = read_digests(run.digests)
    return Audit(
        steps=(first, last),
        start=start[0],
        compared=len(wanted),
        broken=tuple(broken_links(lines)),
        where=found,
        chain=next(line.chain for line in lines if line.digests.step == last),
    )


def describe_audit(audit: Audit) -> Iterator[str]:
    """The result in lines."""
    if audit.broken:
        steps = ", ".join(map(str, audit.broken[:5]))
        yield f"the chain of digests is broken at step {steps}: lines were lost or changed there"
    first, last = audit.steps
    if audit.where is not None:
        what = {"gradients": "loss or gradients", "update": "update", "start": "parameters before"}
        yield (
            f"not confirmed: step {audit.where.step} has another {what[audit.where.kind]} when it "
            "is trained again"
        )
        return
    yield (
        f"{audit.compared} steps, {first} to {last}, trained again from step {audit.start}: every "
        f"loss, and all gradients and parameters, have the same digests; chain {audit.chain[:16]}"
    )
