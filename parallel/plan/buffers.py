"""The memory that gradients and messages take while a step runs, beside what is kept.

The limits here are those of the exchange (parallel/optimizer/exchange and sharding), which reads
them. Pure; needs no torch.
"""

from __future__ import annotations

from collections import Counter
from math import ceil

from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.sharding import shard_group, shards
from holdfast.parallel.precision import Precision

STAGED_BYTES = 1 << 25
"""The bytes of packed sums that wait for their receivers at once."""
RECEIVED_BYTES = 1 << 26
"""The bytes of sums that are received at once.

Where several ranks send to one, packets are lost: while some streams wait for these again, others
go on, if enough has been asked for. (Measured with 4 ranks at 200 Mbit/s and TCP's BBR: sums take
3.5 s with all asked for, 4.4 s with 16 messages and 6.4 s with 4.)"""
PACKED_BYTES = 5
"""The bytes of a packed integer sum that estimates assume: 4.1 to 5.2 were measured."""
SHARED_BYTES = 1 << 24
"""The bytes of shared gradients that wait for their keepers at once, or those of a layer."""
MESSAGES_AHEAD = 4
"""The messages that are received at once, at least, so that one arrives while another is added; of
shared gradients, one from each rank of the group if that is more."""
LAYERS_AHEAD = 1
"""The layers whose shared parameters are received beyond the one in use, or the one awaited."""


def staged_bytes(largest_layer_bytes: int) -> int:
    """The bytes of shared gradients that wait for their keepers at once. Pure."""
    return max(SHARED_BYTES, largest_layer_bytes)


def buffer_bytes(plan: Plan, rank: int, *, precision: Precision, exact: bool, sent: float) -> int:
    """The bytes that a rank's gradients and messages take at most while a step runs. Pure.

    Args:
        sent: the elements of sums that the rank sends to owners in a step; it receives as many.
    """
    layers = plan.layers_at(rank)
    sizes = [sum(row.spec.elements for row in plan.rows_of(rank, layer)) for layer in layers]
    largest = max(sizes, default=0) * precision.bytes
    found = 0
    if sent:
        sums = 8 if exact else precision.state.bytes
        held = (block.elements for part in plan.parts_of(rank) for block in plan.blocks[part])
        longest = max(held, default=0) * sums
        found += int(min(STAGED_BYTES, sent * PACKED_BYTES)) * exact  # floats leave from the sums
        found += int(min(max(RECEIVED_BYTES, MESSAGES_AHEAD * longest), sent * sums)) + longest
    if shards(plan, "gradients"):
        size = len(shard_group(plan, rank, "gradients").ranks)
        staged = staged_bytes(largest) if size > 1 else 0
        arriving = max(MESSAGES_AHEAD, size) * ceil(largest / size) if size > 1 else 0
        found += largest + staged + staged // size + arriving
    elif exact:
        found += _largest_parameter(plan, rank, layers) * precision.bytes
    if shards(plan, "parameters"):
        size = len(shard_group(plan, rank, "parameters").ranks)
        found += largest + (LAYERS_AHEAD + 1) * (largest - largest // size)
    return found


def _largest_parameter(plan: Plan, rank: int, layers: list[int]) -> int:
    """The elements of the largest local parameter."""
    sizes: Counter[tuple[int, int, str]] = Counter()
    for layer in layers:
        for _, part, _, spec in plan.rows_of(rank, layer):
            sizes[layer, part, spec.local] += spec.elements
    return max(sizes.values(), default=0)
