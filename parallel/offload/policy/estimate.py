"""The estimate, before a run, of what offload saves and what it asks of a drive. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.parallel.offload.policy.amount import BUSY, window_of
from holdfast.parallel.plan import Plan, action_cost, peak_activation_bytes, training_program
from holdfast.parallel.schedules import Op


@dataclass(frozen=True, slots=True)
class OffloadEstimate:
    """The estimate for one rank."""

    share: float
    """The share of its activations that is sent: what is allowed, or what the drive can take."""
    activations: int
    """Bytes of activations kept in memory at the fullest moment of a step."""
    saved: int
    """Bytes fewer than without offload, at that moment."""
    written_bytes: int
    """Bytes written in a step."""
    needed_bytes_per_s: float | None
    """The write rate at which all allowed bytes leave during the forward passes; None: unknown."""
    fast_enough: bool | None
    """Whether the drive has that rate; None when either is unknown."""


def estimate_offload(
    plan: Plan, rank: int, *, most_share: float, flops_per_s: float, drive_bytes_per_s: float
) -> OffloadEstimate:
    """Estimate the effect of offload for one rank.

    Memory keeps the share that is not sent, a window on its way out or back, and the layer that is
    being computed.

    Args:
        most_share: the largest share that may be sent, in [0, 1].
        flops_per_s: the rank's compute rate; 0: unknown.
        drive_bytes_per_s: the rate at which its drive writes; 0: unknown.
    """
    layers = {chunk: plan.layers_of(chunk) for chunk in plan.chunks_of(rank)}
    chunk_bytes = {chunk: plan.activation_bytes(plan.chunk_layers[chunk]) for chunk in layers}
    forwards = [action for action in training_program(plan, rank) if action.op is Op.FORWARD]
    eligible = sum(chunk_bytes[action.chunk] for action in forwards)
    share, needed, fast_enough = most_share, None, None
    if flops_per_s > 0 and forwards:
        cost = action_cost(plan, flops_per_s)
        forward_s = sum(map(cost, forwards)) * BUSY
        needed = most_share * eligible / forward_s
        if drive_bytes_per_s > 0:
            fast_enough = drive_bytes_per_s >= needed
            share = min(most_share, drive_bytes_per_s * forward_s / max(1, eligible))
    peak = peak_activation_bytes(plan, rank)
    largest = max(
        (plan.layers[layer].activation_bytes for held in layers.values() for layer in held),
        default=0,
    )
    window = window_of(int(max(chunk_bytes.values(), default=0)))
    kept = min(peak, int(peak * (1 - share) + window * (1 + share)) + largest)
    return OffloadEstimate(
        share=share,
        activations=kept,
        saved=peak - kept,
        written_bytes=int(eligible * share),
        needed_bytes_per_s=needed,
        fast_enough=fast_enough,
    )
