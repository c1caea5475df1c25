"""A digest of all parameters of a run, whatever its layout."""

from __future__ import annotations

import hashlib

import torch

from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer import ParameterBuffer, ShardedOptimizer


def parameter_digest(
    optimizer: ShardedOptimizer, buffer: ParameterBuffer, control: Communicator
) -> str:
    """SHA-256 over all parameters, equal for equal bits in any layout of one tensor size.

    Collective over `control`, the group of all ranks. Every owner hashes its blocks; the digest is
    over all block hashes in block order.
    """
    halves = torch.zeros(optimizer.slots, 4, dtype=torch.int64)
    for block in optimizer.owned:
        values = buffer.values[block.start : block.stop].contiguous().cpu()
        digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).digest()
        words = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8, 16, 24)]
        halves[optimizer.slot(block)] = torch.tensor(words)
    control.all_reduce(halves).wait()
    return hashlib.sha256(halves.numpy().tobytes()).hexdigest()
