"""The reduced gradients that owners send to the followers of their blocks. Pure.

Followers are shadows, and ranks that a block is incoming on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.parallel.optimizer.exchange.buckets import block_runs
from holdfast.parallel.optimizer.spans import Span, joined
from holdfast.parallel.plan import BlockKey, Plan


@dataclass(frozen=True, slots=True)
class FollowerRoutes:
    """The gradients that one rank sends to followers, and those that it receives as one."""

    sends: Mapping[int, tuple[tuple[int, tuple[Span, ...]], ...]]
    """Row of an owned bucket -> (follower, places in the flat gradients of the owned blocks)."""
    receives: tuple[tuple[int, int, tuple[Span, ...]], ...]
    """(owner, row of its bucket, places in the flat gradients of the followed blocks)."""


def follower_routes(
    plan: Plan, rank: int, followed: Mapping[BlockKey, Span], bucket_elements: int
) -> FollowerRoutes:
    """The routes of one rank's reduced gradients. Pure; the two ends of a message agree.

    Args:
        followed: the place of each followed block in the flat copies of this rank.
        bucket_elements: as for `routes`.
    """
    stop = sum(plan.block(key).elements for key in plan.owned_blocks(rank))
    sends: dict[int, tuple[tuple[int, tuple[Span, ...]], ...]] = {}
    for row, blocks in enumerate(block_runs(plan, rank, bucket_elements)):
        start = stop = stop - sum(block.elements for block in blocks)
        places: dict[int, list[Span]] = {}
        for block in blocks:
            for follower in plan.followers(block.key):
                places.setdefault(follower, []).append(Span(start, start + block.elements))
            start += block.elements
        sends[row] = tuple((peer, joined(spans)) for peer, spans in sorted(places.items()))
    owners = sorted({plan.owner(key) for key in followed})
    receives = []
    for owner in owners:
        for row, blocks in enumerate(block_runs(plan, owner, bucket_elements)):
            mine = joined(followed[block.key] for block in blocks if block.key in followed)
            if mine:
                receives.append((owner, row, mine))
    return FollowerRoutes(sends, tuple(receives))
