"""The digest of all parameters of a run, equal in every layout."""

from __future__ import annotations

import hashlib

import torch

from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer import ParameterBuffer, ShardedOptimizer
from holdfast.parallel.plan import Plan


def parameter_digest(
    plan: Plan, optimizer: ShardedOptimizer, buffer: ParameterBuffer, control: Communicator
) -> str:
    """SHA-256 over all parameters, equal for equal bits in any layout with as many parts of them.

    Collective over `control`, all ranks. Every owner hashes its blocks, and the digest is over all
    block hashes in block order.
    """
    halves = torch.zeros(optimizer.slots, 4, dtype=torch.int64)
    for block in optimizer.owned:
        values = buffer.part(block.start, block.stop).contiguous().cpu()
        digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).digest()
        words = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8, 16, 24)]
        halves[optimizer.slot(block)] = torch.tensor(words)
    control.all_reduce(halves).wait()
    by_shard = halves.split([len(blocks) for blocks in plan.blocks])
    once = torch.cat([by_shard[shard] for shard in plan.configured_mesh.first_holders])
    return hashlib.sha256(once.numpy().tobytes()).hexdigest()
