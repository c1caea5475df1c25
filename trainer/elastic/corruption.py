"""Silent corruption: found by comparing checksums of all copies of every block.

CRC-32C, which detects order and single bits, of value and both moments. Every holder computes it,
one all_reduce shares it, and every rank compares.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast import _native
from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer import move_blocks
from holdfast.parallel.plan import BlockKey, BlockTransfer, Plan, all_keepers, block_box
from holdfast.trainer.elastic.block_states import BlockStates
from holdfast.trainer.step import Training


@dataclass(frozen=True, slots=True)
class Corruption:
    """Copies of one block that should be equal and differ."""

    key: BlockKey
    tensor: str
    """The block's logical tensor and box."""
    suspects: tuple[int, ...]
    """The ranks with a wrong copy; all holders if no majority decides."""
    good: int | None
    """A rank with the majority's copy; None without a majority."""
    used_by: frozenset[int]
    """The ranks whose copy of the block's weights some rank computes with."""

    @property
    def spares_training(self) -> bool:
        """Whether only copies are wrong that no rank computes with: no step used a wrong value."""
        return self.good is not None and self.used_by.isdisjoint(self.suspects)


@dataclass(frozen=True, slots=True)
class CopyComparison:
    """The result of comparing all copies of the state; equal on every rank."""

    corrupt: tuple[Corruption, ...]
    digest: str
    """SHA-256 of the checksums of all copies of all blocks: the name of this state and layout."""


def compare_copies(training: Training, members: Communicator) -> CopyComparison:
    """Compare the checksums of every block on all its holders. Collective over all ranks."""
    plan = training.plan
    copies = 1 + max((len(s) for shadows in plan.shadows for s in shadows), default=0)
    slots = [len(blocks) for blocks in plan.blocks]
    table = torch.zeros(sum(slots), copies, len(training.optimizer.form.held), dtype=torch.int64)
    states = BlockStates(training)
    first = 0
    with training.busy("compare"):
        for index, blocks in enumerate(plan.blocks):
            for place in range(len(blocks)):
                holders = _holders(plan, (index, place))
                if training.rank in holders:
                    sums = _checksums(states, (index, place))
                    table[first + place, holders.index(training.rank)] = sums
            first += len(blocks)
    # Not marked as busy: the wait for this message is no work.
    members.all_reduce(table).wait()
    found: list[Corruption] = []
    first = 0
    for index, blocks in enumerate(plan.blocks):
        for place in range(len(blocks)):
            holders = _holders(plan, (index, place))
            rows = [tuple(row) for row in table[first + place, : len(holders)].tolist()]
            if len(set(rows)) > 1:
                found.append(_judge(plan, (index, place), holders, rows))
        first += len(blocks)
    digest = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    return CopyComparison(tuple(found), digest)


def _holders(plan: Plan, key: BlockKey) -> tuple[int, ...]:
    index, place = key
    shadows = plan.shadows[index][place] if plan.shadows else ()
    return (plan.owner(key), *shadows)


def _checksums(states: BlockStates, key: BlockKey) -> Tensor:
    copies = [live.cpu() for live in states.read(key).values()]
    sums = [_native.crc32c(values.data_ptr(), values.nbytes) for values in copies]
    return torch.tensor(sums, dtype=torch.int64)


def _judge(
    plan: Plan, key: BlockKey, holders: tuple[int, ...], rows: list[tuple[int, ...]]
) -> Corruption:
    block = plan.block(key)
    spec = plan.spec_of(block)
    row, votes = Counter(rows).most_common(1)[0]
    decided = 2 * votes > len(rows)
    wrong = [rank for rank, own in zip(holders, rows, strict=True) if own != row or not decided]
    good = holders[rows.index(row)] if decided else None
    used_by = frozenset(all_keepers(plan, block, "parameters"))
    tensor = f"{spec.name}{block_box(spec, block)}"
    return Corruption(key, tensor, tuple(wrong), good, used_by)


def repair(training: Training, found: Sequence[Corruption], members: Communicator) -> None:
    """Replace wrong copies by good ones. Collective over all ranks.

    It serves only corruption that spares training: results of a wrong value stay wrong.
    """
    plan, states = training.plan, BlockStates(training)
    block_transfers = [
        BlockTransfer(c.good, rank, (c.key,), (plan.block(c.key).elements,))
        for c in found
        if c.good is not None
        for rank in c.suspects
    ]
    move_blocks(
        block_transfers,
        training.rank,
        members,
        states.read,
        states.write,
        form=training.optimizer.form,
    )
