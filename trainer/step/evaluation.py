"""The mean loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from holdfast.parallel.comm import Communicator
from holdfast.trainer.step.ballot import loss_slots, mean_loss


def mean_held_out_loss(
    losses_of: Callable[[int], Mapping[int, Tensor]],
    control: Communicator,
    *,
    batches: int,
    micro_batches: int,
    tokens: int,
) -> float:
    """The mean of the losses of `batches` global batches. Collective over `control`, all ranks.

    Args:
        losses_of: computes a global batch forward. Returns the loss sums that this rank reports, by
            micro-batch.
        micro_batches, tokens: of one global batch.
    """
    total = 0.0
    for batch in range(batches):
        slots = loss_slots(losses_of(batch), micro_batches)
        control.all_reduce(slots).wait()
        total += mean_loss(slots.tolist(), tokens)
    return total / batches
