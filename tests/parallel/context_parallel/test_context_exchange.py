"""Attention of slices that several ranks have: the bits of one rank, whatever is exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import Store

from holdfast.parallel.comm import build_groups
from holdfast.parallel.context_parallel import ContextParallel
from holdfast.parallel.layout import Slices, slices_of
from holdfast.parallel.pipeline import Documents
from support.processes.cluster import Cluster

BATCH, SEQ, DIM = 2, 64, 8
DOCUMENTS = [[1, 30, 33], [5, 5, 22, 31, 1]]


def tensors(slices: Slices, heads: int, kv_heads: int, dtype: str) -> list[list[Tensor]]:
    """Queries, keys, values and gradients by the output, of the own slices."""
    random = torch.Generator().manual_seed(3)
    found = []
    for count in (heads, kv_heads, kv_heads, heads):
        whole = torch.randn(BATCH, count, SEQ, DIM, generator=random, dtype=torch.float64)
        parts = whole.to(getattr(torch, dtype)).chunk(slices.count, dim=2)
        found.append([parts[number].contiguous() for number in slices.own])
    return found


def attended(
    rank: int,
    world_size: int,
    store: Store | None,
    *,
    slices: int,
    heads: tuple[int, int],
    dtype: str,
    exchange: Any,
    packed: bool,
) -> dict[int, list[Any]]:
    """By own slice: the output, and the gradients by queries, keys and values, as lists."""
    group = None
    if store is not None:
        world = range(world_size)
        groups = build_groups(
            store, "127.0.0.1", rank, world, {"tensor": world}, backend="gloo", generation=0
        )
        group = groups.world
    own = slices_of(SEQ, slices, world_size, rank)
    documents = Documents.of((n for row in DOCUMENTS for n in row), BATCH) if packed else None
    *given, gradients = tensors(own, *heads, dtype)
    for _ in range(2):  # buffers are used again, and nothing of the first time is left in them
        leaves = [[part.clone().requires_grad_() for part in parts] for parts in given]
        query, key, value = leaves
        outputs = ContextParallel(group, exchange).attend(
            query, key, value, own, documents, {}, None
        )
        torch.autograd.backward(outputs, gradients)
    return {
        number: [
            part.detach().double().tolist()
            for part in (outputs[n], *(leaves[kind][n].grad for kind in range(3)))
            if part is not None
        ]
        for n, number in enumerate(own.own)
    }


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_attend_as_one_alone_would(
    cluster: Cluster, heads: tuple[int, int], dtype: str, packed: bool
) -> None:
    keys: dict[str, Any] = {"slices": 8, "heads": heads, "dtype": dtype, "packed": packed}
    alone = attended(0, 1, None, exchange="heads", **keys)
    for ranks, exchange in ((2, "heads"), (4, "heads"), (2, "keys"), (4, "keys"), (8, "keys")):
        results = cluster.run("test_context_exchange:attended", ranks, exchange=exchange, **keys)
        together = {number: found for one in results for number, found in one.items()}
        assert together == alone, (ranks, exchange)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1)], ids=str)
def test_a_ring_gives_what_one_rank_does(
    cluster: Cluster, heads: tuple[int, int], packed: bool
) -> None:
    for dtype, tolerance in (("float64", 1e-10), ("bfloat16", 0.05)):
        for slices in (4, 8):
            keys: dict[str, Any] = {"slices": slices, "heads": heads, "packed": packed}
            # In float64, so that narrow results are compared with right ones.
            alone = attended(0, 1, None, exchange="heads", dtype="float64", **keys)
            for ranks in (2, 4):
                results = cluster.run(
                    "test_context_exchange:attended", ranks, exchange="ring", dtype=dtype, **keys
                )
                together = {number: found for one in results for number, found in one.items()}
                assert together.keys() == alone.keys()
                for number, right in alone.items():
                    for found, wanted in zip(together[number], right, strict=True):
                        torch.testing.assert_close(
                            torch.tensor(found),
                            torch.tensor(wanted),
                            rtol=tolerance,
                            atol=tolerance,
                        )
