"""Attention of slices that several ranks have: the bits of one rank, whatever is exchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
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


Case = dict[str, Any]
"""Arguments of `attended`."""
Found = dict[int, list[np.ndarray]]
"""By slice: the output, and the gradients by queries, keys and values."""


def attended_all(rank: int, world_size: int, store: Store, *, cases: list[Case]) -> list[Found]:
    """What one rank of a group finds, by case."""
    world = range(world_size)
    groups = build_groups(
        store, "127.0.0.1", rank, world, {"tensor": world}, backend="gloo", generation=0
    )
    return [attended(groups.world, rank, world_size, **case) for case in cases]


def attended(
    group: Any,
    rank: int,
    world_size: int,
    *,
    slices: int,
    heads: tuple[int, int],
    dtype: str,
    exchange: Any,
    packed: bool,
) -> Found:
    """What one rank finds of its own slices."""
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
            part.detach().double().numpy()
            for part in (outputs[n], *(leaves[kind][n].grad for kind in range(3)))
            if part is not None
        ]
        for n, number in enumerate(own.own)
    }


def together(cluster: Cluster, ranks: int, cases: list[Case]) -> list[Found]:
    """What all ranks of a group find, by case; one group has all cases in turn."""
    found = cluster.run("test_context_exchange:attended_all", ranks, cases=cases, timeout_s=240.0)
    return [
        {number: parts for one in of_a_case for number, parts in one.items()}
        for of_a_case in zip(*found, strict=True)
    ]


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "exchanges"), [(2, ("heads", "keys")), (4, ("heads", "keys")), (8, ("keys",))]
)
def test_ranks_attend_as_one_alone_would(
    cluster: Cluster, ranks: int, exchanges: tuple[str, ...]
) -> None:
    cases = [
        {"slices": 8, "heads": heads, "dtype": dtype, "packed": packed}
        for heads in ((4, 4), (4, 2), (8, 1))
        for dtype in ("float32", "bfloat16")
        for packed in (False, True)
    ]
    alone = [attended(None, 0, 1, exchange="heads", **case) for case in cases]
    for exchange in exchanges:
        tried = [{**case, "exchange": exchange} for case in cases]
        for case, found, wanted in zip(tried, together(cluster, ranks, tried), alone, strict=True):
            assert found.keys() == wanted.keys(), case
            for number, parts in wanted.items():
                assert len(parts) == len(found[number]) == 4, case
                assert all(map(np.array_equal, found[number], parts)), case


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ring_gives_what_one_rank_does(cluster: Cluster, ranks: int) -> None:
    tolerances = {"float64": 1e-10, "bfloat16": 0.05}
    cases = [
        {"slices": slices, "heads": heads, "packed": packed, "dtype": dtype, "exchange": "ring"}
        for slices in (4, 8)
        for heads in ((4, 4), (8, 1))
        for packed in (False, True)
        for dtype in tolerances
    ]
    for case, found in zip(cases, together(cluster, ranks, cases), strict=True):
        # In float64, so that narrow results are compared with right ones.
        alone = attended(None, 0, 1, **{**case, "exchange": "heads", "dtype": "float64"})
        tolerance = tolerances[case["dtype"]]
        assert found.keys() == alone.keys()
        for number, right in alone.items():
            for seen, wanted in zip(found[number], right, strict=True):
                np.testing.assert_allclose(
                    seen, wanted, rtol=tolerance, atol=tolerance, err_msg=str(case)
                )
