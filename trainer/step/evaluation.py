"""The validation sets of a run, and the mean loss on one of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from holdfast.trainer.config import HELD_OUT, RunConfig, validation_data
from holdfast.trainer.data import Dataset, open_dataset
from holdfast.trainer.step.construction import open_split
from holdfast.trainer.step.vote import (
    SliceLosses,
    loss_slots,
    mean_loss,
)


def evaluates_after(config: RunConfig, step: int) -> bool:
    """Whether a run evaluates after `step` steps. Pure."""
    every = config.train.eval_every
    return bool(every) and (step == config.train.steps or step % every == 0)


def open_validation(config: RunConfig) -> dict[str, Dataset]:
    """The data that a run evaluates on, by name: what is held out first, and the named sets.

    The order of a named set does not depend on the run's seed.

    Raises:
        DataError: the data cannot be used.
    """
    found = {} if config.data.eval_fraction == 0 else {HELD_OUT: open_split(config, "eval")}
    for own in config.data.validation:
        section = validation_data(config.data, own)
        vocab, seq_len = config.model.vocab, config.train.seq_len
        found[own.name] = open_dataset(section, vocab=vocab, seq_len=seq_len, seed=0)
    return found


def batches_of(config: RunConfig, name: str, data: Dataset) -> int:
    """The global batches of an evaluation: a named set is not read more than once. Pure."""
    batches = config.train.eval_batches
    if name == HELD_OUT:
        return batches
    return min(batches, max(1, data.size // config.train.global_batch))


def mean_held_out_loss(
    losses_of: Callable[[int], SliceLosses],
    predicted_in: Callable[[int], int],
    add: Callable[[Tensor], None],
    *,
    batches: int,
    micro_batches: int,
    slices: int,
) -> float:
    """The mean loss of a token in `batches` global batches. Collective over the ranks of `add`.

    Args:
        losses_of: computes a global batch forward. Returns the loss sums that this rank reports.
        predicted_in: the number of tokens that a global batch predicts, over all ranks.
        add: adds loss sums over all ranks, in place.
        micro_batches, slices: of one global batch, and of a sequence.
    """
    counts = [max(1, predicted_in(batch)) for batch in range(batches)]
    total = 0.0
    for batch, count in enumerate(counts):
        slots = loss_slots(losses_of(batch), micro_batches, slices)
        add(slots)
        # A batch counts by its tokens: by exactly 1 if all have as many.
        total += mean_loss(slots.tolist(), count) * (count * batches / sum(counts))
    return total / batches
