"""Going back: by the rule of spikes, or because a person asks. Collective over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from holdfast.parallel.errors import DataError
from holdfast.trainer.config import Removal
from holdfast.trainer.data import described_sample
from holdfast.trainer.reports import Reporter
from holdfast.trainer.saves.checkpointing import Checkpoints
from holdfast.trainer.saves.rewind.requests import MOST_SAMPLES, RewindRequest, take_request
from holdfast.trainer.saves.rewind.search import Culprit, find_culprit
from holdfast.trainer.step import Outcome, Training


def go_back_from_spike(
    training: Training, checkpoints: Checkpoints, reporter: Reporter, step: int, outcome: Outcome
) -> bool:
    """Search for what causes a spike, and go back and on without it.

    Args:
        step: the one with the spike, counted from 0, which was not applied.
    Returns:
        Whether the run has gone back; otherwise nothing was found.
    """
    config = training.config
    if config.numerics.spike_action != "rewind" or not outcome.spike or outcome.requests.stop:
        return False
    steps, found = training.history.steps, find_culprit(training, step)
    if found is None:
        said = f"step {step + 1} is a spike ({outcome.spike}), and no sample explains it: "
        if steps:
            said += f"it stays one without each that stands out in steps {steps[0] + 1} to "
            said += f"{step + 1}"
        else:
            said += "no step is known that can be taken back, as ranks have just changed"
        reporter.stays(step + 1, said)
        return False
    removal = Removal(start=found.step, samples=sorted(found.samples))
    why = _why(training, step, outcome, found)
    _go_back(training, checkpoints, reporter, removal, why)
    return True


def _why(training: Training, step: int, outcome: Outcome, found: Culprit) -> Mapping[str, Any]:
    """The fields of the event."""
    named = [
        f"{described_sample(training.config.data, training.data, place)} (micro-batch "
        f"{micro_batch} of step {found.step + 1})"
        for place, micro_batch in zip(found.places, found.micro_batches, strict=True)
    ]
    them = "it" if len(named) == 1 else "them"
    message = (
        f"step {step + 1} is a spike: {outcome.spike}; its cause is {' with '.join(named)}; the "
        f"run goes back to step {found.step} and on without {them}, to a loss of {found.loss:.6g} "
        f"instead of {outcome.loss:.6g}"
    )
    return {
        "by": "rule",
        "spike": step + 1,
        "steps": step - found.step,
        "micro_batches": found.micro_batches,
        "samples": found.samples,
        "loss": outcome.loss,
        "loss_without": found.loss,
        "message": message,
    }


def answer_request(
    training: Training, checkpoints: Checkpoints, reporter: Reporter, done: int
) -> None:
    """Do what a person asked for with a file, if it can be done.

    Args:
        done: the number of steps done.
    """
    request = _told(training, checkpoints.take_rewind(take_request))
    if request is None:
        return
    target = done - request.steps
    if target not in training.history.steps:
        known = training.history.steps
        most = done - known[0] if known else 0
        message = (
            f"the run cannot take {request.steps} steps back after step {done}: memory has the "
            f"last {most} (elastic.rewind = {training.config.elastic.rewind}, which begins anew "
            "when ranks change); stop it, and take steps back from a checkpoint"
        )
        reporter.stays(done, message, request.name)
        return
    removal = Removal(start=target, samples=request.samples)
    try:
        training.data.without([(0, request.samples)])
    except DataError as error:
        reporter.stays(done, str(error), request.name)
        return
    named = f" without sample {', '.join(map(str, request.samples))}" if request.samples else ""
    why = {
        "by": "hand",
        "request": request.name,
        "steps": request.steps,
        "samples": request.samples,
        "message": f"as asked, the run goes back from step {done} to step {target} and on{named}",
    }
    _go_back(training, checkpoints, reporter, removal, why)


def _told(training: Training, mine: RewindRequest | None) -> RewindRequest | None:
    """The request that one rank has read, on all of them. Collective."""
    numbers = torch.zeros(3 + MOST_SAMPLES, dtype=torch.int64)
    if mine is not None:
        words = [mine.steps, len(mine.samples), int(mine.name, 16), *mine.samples]
        numbers[: len(words)] = torch.tensor(words)
    training.groups.control.all_reduce(numbers).wait()
    steps, count, name, *samples = numbers.tolist()
    return RewindRequest(f"{name:x}", steps, samples[:count]) if steps else None


def _go_back(
    training: Training,
    checkpoints: Checkpoints,
    reporter: Reporter,
    removal: Removal,
    why: Mapping[str, Any],
) -> None:
    removals: Sequence[Removal] = [removal] if removal.samples else []
    training.finish_gather()
    training.go_back(removal.start, removals)
    training.gather_again()
    ended = checkpoints.go_back(removal.start)
    with training.busy("report"):
        reporter.checkpoints(ended)
        reporter.went_back(removal.start, why)
