"""Sharded gradients and parameters: the ranks that keep each block's sums, and its parameters.

The replicas of a stage form *shard groups*. The ranks of a group share what one replica would keep:
for each block, one of them is its *keeper* (ZeRO-2 and -3, Rajbhandari et al. 2020, sections 5.2
and 5.3; with several groups, the hybrid sharding of Zhao et al. 2023, section 3.2.2). A group of
one rank keeps everything, which is how ordinary replicas are described. Experts that are spread
over ranks are not shared further: each of their hosts keeps them. Pure; needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from holdfast.parallel.plan.ownership import Block
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.schedules import Op, Program

KeptKind = Literal["gradients", "parameters"]
"""What is kept: sums of gradients during a step, or parameters."""
KEPT_KINDS: tuple[KeptKind, ...] = get_args(KeptKind)
_WEIGHT_GRADIENTS = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
_INPUT_GRADIENTS = (Op.BACKWARD, Op.BACKWARD_INPUT)


@dataclass(frozen=True, slots=True)
class ShardGroup:
    """The ranks that share the gradients of one part of a stage's parameters, or that part."""

    ranks: tuple[int, ...]

    def keeper(self, block_owner: int, position: int) -> int:
        """The rank of the group that keeps a block.

        Args:
            block_owner: the block's owner, which is its keeper in its own group.
            position: the owner's position in its own group; other groups take the same position,
                so that they are as balanced as owners are.
        """
        if block_owner in self.ranks:
            return block_owner
        return self.ranks[position % len(self.ranks)]


def shards(plan: Plan, kept: KeptKind) -> bool:
    """Whether a plan's ranks share what they would otherwise keep whole."""
    return plan.shard == "parameters" or plan.shard == kept


def shard_groups(plan: Plan, part: int, stage: int, kept: KeptKind) -> tuple[ShardGroup, ...]:
    """The shard groups of the ranks of a stage that hold a part of its parameters.

    A group has at least as many ranks as the plan says, where the stage has them: after losses the
    groups that are left grow, because smaller ones would need more memory.
    """

    def make() -> tuple[ShardGroup, ...]:
        ranks = plan.ranks_of((part,), stage)
        size = (plan.shard_group or len(ranks)) if shards(plan, kept) else 1
        count = max(1, len(ranks) // size)
        edges = [len(ranks) * number // count for number in range(count + 1)]
        return tuple(ShardGroup(ranks[a:b]) for a, b in pairwise(edges))

    return plan.derived("shard groups", (part, stage, kept), make)


def shard_group(plan: Plan, rank: int, kept: KeptKind) -> ShardGroup:
    """The shard group of a rank; a spare is alone, and so is each rank where none share."""
    place = plan.stage_replicas.find(rank)
    if place is None or not shards(plan, kept):
        return ShardGroup((rank,))
    groups = shard_groups(plan, plan.parts_of(rank)[0], place.pipeline, kept)
    return groups[_positions(plan, kept)[rank][0]]


def is_whole(plan: Plan, block: Block) -> bool:
    """Whether every rank keeps a block's sums whole: rows that several parts have, and loads.

    They belong to norms and the like, which are small. What ranks share travels in the type of the
    parameters, in which loads would be rounded.
    """
    spec = plan.spec_of(block)
    return len(spec.copies) > 1 or spec.balance is not None


def is_apart(plan: Plan, block: Block, kept: KeptKind) -> bool:
    """Whether a block is not shared: each rank that has it keeps it, or the sums that it adds."""
    if plan.spreads_experts and plan.spec_of(block).expert is not None:
        return True
    return kept == "gradients" and is_whole(plan, block)


def keepers(plan: Plan, block: Block, kept: KeptKind, layer: int | None = None) -> tuple[int, ...]:
    """The ranks that keep a block, or its sums, at one use: one for each shard group of that stage.

    Of sums that several ranks would have alike, one rank's are kept.

    Args:
        layer: the layer of the use; None: the first use.
    """
    if is_apart(plan, block, kept) or not shards(plan, kept):
        of_use = plan.contributors if kept == "gradients" else plan.holders
        return of_use(block, layer)
    stage = plan.stage_of_layer(block.layer if layer is None else layer)
    owner = plan.owner(block.key)
    position = _positions(plan, kept)[owner][1]
    first, *further = plan.spec_of(block).copies
    groups = shard_groups(plan, first, stage, kept)
    if further:  # a rank may have several of the parts
        groups = dict.fromkeys(
            group for part in (first, *further) for group in shard_groups(plan, part, stage, kept)
        )
    return tuple(group.keeper(owner, position) for group in groups)


def keeping(plan: Plan, rank: int, kept: KeptKind) -> Callable[[Block, int], bool]:
    """A function of a block that a rank holds, and the layer of a use: whether the rank is among
    its `keepers` there. Pure; for many blocks of one rank.
    """
    if not shards(plan, kept) or len(plan.parts_of(rank)) > 1:  # several parts: several groups
        return lambda block, layer: rank in keepers(plan, block, kept, layer)
    group, positions = shard_group(plan, rank, kept), _positions(plan, kept)

    def keeps(block: Block, layer: int) -> bool:
        if is_apart(plan, block, kept):
            return rank in keepers(plan, block, kept, layer)
        owner = plan.owner(block.key)
        return group.keeper(owner, positions[owner][1]) == rank

    return keeps


def all_keepers(plan: Plan, block: Block, kept: KeptKind) -> tuple[int, ...]:
    """The ranks that keep a block at any use, in ascending order."""
    found = set(keepers(plan, block, kept))
    for layer in plan.tied_layers(block):
        found.update(keepers(plan, block, kept, layer))
    return tuple(sorted(found))


def keeps_parameters(plan: Plan, block: Block, rank: int) -> bool:
    """Whether a rank is among the keepers of a block's parameters at any use. Pure."""
    uses = (block.layer, *plan.tied_layers(block))
    if shards(plan, "parameters"):
        return any(rank in keepers(plan, block, "parameters", layer) for layer in uses)
    place = plan.stage_replicas.find(rank)
    if place is None or place.pipeline not in map(plan.stage_of_layer, uses):
        return False
    return not frozenset(plan.parts_of(rank)).isdisjoint(plan.spec_of(block).copies)


def _positions(plan: Plan, kept: KeptKind) -> Mapping[int, tuple[int, int]]:
    """The number of each rank's shard group in its stage, and its position there."""

    def find() -> dict[int, tuple[int, int]]:
        return {
            member: (number, position)
            for stage in range(plan.stage_replicas.pipeline)
            for part in range(plan.configured_mesh.parts)
            for number, group in enumerate(shard_groups(plan, part, stage, kept))
            for position, member in enumerate(group.ranks)
        }

    return plan.derived("shard positions", kept, find)


def are_aligned(plan: Plan, group: ShardGroup, only: frozenset[int] | None = None) -> bool:
    """Whether the ranks of a group do the same things in the same order, as far as each goes.

    Then a rank may wait until others have taken what it sends, and until they are about as far as
    it is: of all ranks, the one that is behind waits for none. Otherwise ranks could wait for each
    other in a circle, because one computes forwards where another sends gradients.

    Args:
        only: the micro-batches that are computed; None: all.
    """
    if plan.stage_replicas.pipeline > 1:
        counts = {
            len(numbers) if only is None else len(only.intersection(numbers))
            for numbers in plan.micro_batches
        }
        return plan.is_regular and len(counts) == 1
    orders = [
        [(action.op, action.chunk) for action in training_program(plan, rank, only)]
        for rank in group.ranks
    ]
    longest = max(orders, key=len)
    return all(order == longest[: len(order)] for order in orders)


Contribution = tuple[int, int]
"""(micro-batch, layer): a layer's gradients of one micro-batch."""


def contribution_order(
    plan: Plan, rank: int, only: frozenset[int] | None = None
) -> tuple[Contribution, ...]:
    """The contributions of a rank in a step, in the order in which they are sent.

    Args:
        only: the micro-batches that are computed; None: all.
    """
    return tuple(
        (action.micro_batch, layer)
        for action in training_program(plan, rank, only)
        if action.op in _WEIGHT_GRADIENTS and action.micro_batch >= 0  # has tokens
        for layer in reversed(plan.layers_of(action.chunk))
    )


def use_order(plan: Plan, program: Program) -> tuple[int, ...]:
    """The layers whose parameters a program uses, in order, repetitions left out."""
    found: list[int] = []
    for action in program:
        layers: Sequence[int] = ()
        if action.op is Op.FORWARD:
            layers = plan.layers_of(action.chunk)
        elif action.op in _INPUT_GRADIENTS:
            backward = reversed(plan.layers_of(action.chunk))
            layers = [layer for layer in backward if not plan.layers[layer].forward_only]
        found += layers
    return tuple(
        layer for place, layer in enumerate(found) if not place or found[place - 1] != layer
    )
