"""The digest of all parameters of a run, equal in every layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer import ShardedOptimizer
from holdfast.parallel.plan import Block, Plan


def parameter_digest(plan: Plan, optimizer: ShardedOptimizer, control: Communicator) -> str:
    """SHA-256 over all parameters, equal for equal bits in any layout with as many parts of them.

    Collective over `control`, all ranks. Every owner hashes its blocks, and the digest is over all
    block hashes, part by part.
    """
    halves = torch.zeros(optimizer.slots, 4, dtype=torch.int64)
    for number, block in enumerate(optimizer.owned):
        values = optimizer.parameters(number).contiguous().cpu()
        digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).digest()
        words = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8, 16, 24)]
        halves[optimizer.slot(block.key)] = torch.tensor(words)
    control.all_reduce(halves).wait()
    places = [optimizer.slot(block.key) for block in _by_part(plan)]
    return hashlib.sha256(halves[places].numpy().tobytes()).hexdigest()


def _by_part(plan: Plan) -> Iterator[Block]:
    """The blocks of each part, by layer and row; those that parts share at each of these."""
    for part in range(len(plan.blocks)):
        for layer, spec in enumerate(plan.layers):
            for row, segment in enumerate(spec.parameters[part]):
                if not segment.tied_use:
                    yield from plan.blocks_of(layer, part, row)
