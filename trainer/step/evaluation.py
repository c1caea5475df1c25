"""The mean loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.parallel.comm import Communicator
from holdfast.trainer.step.ballot import SliceLosses, loss_slots, mean_loss


def mean_held_out_loss(
    losses_of: Callable[[int], SliceLosses],
    predicted_in: Callable[[int], int],
    control: Communicator,
    *,
    batches: int,
    micro_batches: int,
    slices: int,
) -> float:
    """The mean loss of a token in `batches` global batches. Collective over `control`, all ranks.

    Args:
        losses_of: computes a global batch forward. Returns the loss sums that this rank reports.
        predicted_in: the number of tokens that a global batch predicts, over all ranks.
        micro_batches, slices: of one global batch, and of a sequence.
    """
    counts = [max(1, predicted_in(batch)) for batch in range(batches)]
    total = 0.0
    for batch, count in enumerate(counts):
        slots = loss_slots(losses_of(batch), micro_batches, slices)
        control.all_reduce(slots).wait()
        # A batch counts by its tokens: by exactly 1 if all have as many.
        total += mean_loss(slots.tolist(), count) * (count * batches / sum(counts))
    return total / batches
