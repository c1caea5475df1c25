"""The largest logit of each head is that of all scores with the mask written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from holdfast.parallel.context_parallel import logits as module
from holdfast.parallel.context_parallel.attention import Work, sliced_attention
from holdfast.parallel.layout import Slices
from holdfast.parallel.pipeline import Documents

BATCH, HEADS, KV_HEADS, SEQ, DIM = 2, 4, 2, 64, 8
DOCUMENTS = [[1, 30, 33], [5, 5, 22, 31, 1]]


def expected(query: Tensor, keys: Tensor, count: int, window: int, packed: bool) -> Tensor:
    """Of each slice of queries: float64[slices, heads]."""
    wide = keys.double().repeat_interleave(HEADS // KV_HEADS, 1)
    scores = query.double() @ wide.transpose(2, 3) / math.sqrt(DIM)
    behind = torch.arange(SEQ)[:, None] - torch.arange(SEQ)
    hidden = (behind < 0) | (behind >= (window or SEQ))
    if packed:
        rows = [[n for n, size in enumerate(row) for _ in range(size)] for row in DOCUMENTS]
        number = torch.tensor(rows)
        hidden = hidden | (number[:, :, None] != number[:, None, :])[:, None]
    return torch.stack(
        [part.amax((0, 2, 3)) for part in scores.masked_fill(hidden, -torch.inf).chunk(count, 2)]
    )


@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("window", [0, 5, 23])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("block", [7, 2048])
def test_largest_logits_are_those_of_what_is_seen(
    block: int, count: int, window: int, packed: bool
) -> None:
    random = torch.Generator().manual_seed(7)
    query, key, value = (
        torch.randn(BATCH, heads, SEQ, DIM, generator=random, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    documents = Documents.of((n for row in DOCUMENTS for n in row), BATCH) if packed else None
    found: dict[int, Tensor] = {}

    def note(number: int, largest: Callable[[], Tensor]) -> None:
        found[number] = largest()

    work = Work(Slices(SEQ // count, (0,) * count), documents, BATCH, window, note)
    with mock.patch.object(module, "_TOKENS", block):
        q, k, v = (list(part.chunk(count, 2)) for part in (query, key, value))
        sliced_attention(q, k, v, work)
    noted = torch.stack([found[number] for number in range(count)])
    torch.testing.assert_close(
        noted, expected(query, key, count, window, packed), rtol=1e-14, atol=1e-14
    )
