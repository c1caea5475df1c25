"""Attention by slices: against attention with the mask written out, and bit for bit with itself."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from holdfast import _native
from holdfast.parallel.context_parallel.attention import Work, sliced_attention
from holdfast.parallel.context_parallel.kernels import (
    Attended,
    _attend_plainly,
    _plain_backward,
    attend,
    attend_backward,
    merge,
)
from holdfast.parallel.layout import Slices, slices_of
from holdfast.parallel.pipeline import Documents

BATCH, HEADS, KV_HEADS, SEQ, DIM = 2, 4, 2, 64, 8
DOCUMENTS = [[1, 30, 33], [5, 5, 22, 31, 1]]


def tensors(dtype: torch.dtype, heads: int = HEADS, kv_heads: int = KV_HEADS) -> list[Tensor]:
    """Queries, keys, values, and a gradient by the output."""
    random = torch.Generator().manual_seed(3)
    shapes = [heads, kv_heads, kv_heads, heads]
    return [
        torch.randn(BATCH, count, SEQ, DIM, generator=random, dtype=torch.float64).to(dtype)
        for count in shapes
    ]


def documents_of(given_: bool) -> Documents | None:
    return Documents.of((n for row in DOCUMENTS for n in row), BATCH) if given_ else None


def by_slices(
    given_: list[Tensor], count: int, documents: Documents | None
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients by queries, keys and values."""
    leaves = [part.clone().requires_grad_() for part in given_[:3]]
    parts = [[piece.contiguous() for piece in leaf.chunk(count, dim=2)] for leaf in leaves]
    slices = Slices(SEQ // count, (0,) * count)
    query, key, value = parts
    work = Work(slices, documents, BATCH)
    output = torch.cat(sliced_attention(query, key, value, work), dim=2)
    output.backward(given_[3])
    return output.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def with_mask(given_: list[Tensor], documents: Documents | None) -> tuple[Tensor, list[Tensor]]:
    leaves = [part.double().requires_grad_() for part in given_[:3]]
    mask = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(BATCH, 1, SEQ, SEQ)
    if documents is not None:
        rows = [[n for n, size in enumerate(row) for _ in range(size)] for row in DOCUMENTS]
        number = torch.tensor(rows)
        mask = mask & (number[:, :, None] == number[:, None, :])[:, None]
    output = F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    output.backward(given_[3].double())
    return output.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("count", [2, 4, 8, 64])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_slices_attend_as_the_mask_says(
    dtype: torch.dtype, near: float, count: int, packed: bool
) -> None:
    given_, documents = tensors(dtype), documents_of(packed)
    output, gradients = by_slices(given_, count, documents)
    expected, wanted = with_mask(given_, documents)
    torch.testing.assert_close(output.double(), expected, rtol=near, atol=near)
    for found, right in zip(gradients, wanted, strict=True):
        assert found.dtype == dtype
        scale = float(right.abs().max())
        torch.testing.assert_close(found.double(), right, rtol=0, atol=near * scale)


@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_has_its_bits_whatever_other_heads_there_are(
    dtype: torch.dtype, packed: bool
) -> None:
    """Ranks may have some of the heads only."""
    given_, documents = tensors(dtype), documents_of(packed)
    output, gradients = by_slices(given_, 4, documents)
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        queries, keys = slice(head * group, (head + 1) * group), slice(head, head + 1)
        part = [
            given_[0][:, queries],
            given_[1][:, keys],
            given_[2][:, keys],
            given_[3][:, queries],
        ]
        own, own_gradients = by_slices([p.contiguous() for p in part], 4, documents)
        assert own.equal(output[:, queries])
        for found, whole, which in zip(
            own_gradients, gradients, (queries, keys, keys), strict=True
        ):
            assert found.equal(whole[:, which])


def test_later_slices_change_no_bit_of_earlier_ones() -> None:
    given_ = tensors(torch.float32)
    output, _ = by_slices(given_, 4, None)
    for part in given_[:3]:
        part[:, :, SEQ // 2 :] += 1
    changed, _ = by_slices(given_, 4, None)
    assert changed[:, :, : SEQ // 2].equal(output[:, :, : SEQ // 2])
    assert not changed.equal(output)


@pytest.mark.parametrize("causal", [True, False])
def test_the_definition_equals_the_kernel_in_float64(causal: bool) -> None:
    """What devices without a kernel compute."""
    q, k, v, gradient = tensors(torch.float64)
    found, plain = attend(q, k, v, causal=causal), _attend_plainly(q, k, v, causal)
    torch.testing.assert_close(plain.output, found.output, rtol=0, atol=1e-13)
    torch.testing.assert_close(plain.logsumexp, found.logsumexp, rtol=0, atol=1e-13)
    expected = attend_backward(gradient, q, k, v, found, causal=causal)
    by_definition = _plain_backward(gradient, q, k, v, plain, causal)
    for part, right in zip(by_definition, expected, strict=True):
        torch.testing.assert_close(part, right, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), dim=st.integers(1, 40), spread=st.sampled_from([1.0, 90.0, 1e4]))
@pytest.mark.parametrize(
    ("name", "dtype", "near"),
    [("f32", torch.float32, 1e-6), ("f64", torch.float64, 1e-14), ("bf16", torch.bfloat16, 8e-3)],
)
def test_native_merge_joins_rows_by_their_weights(
    name: str, dtype: torch.dtype, near: float, rows: int, dim: int, spread: float
) -> None:
    random = torch.Generator().manual_seed(rows * 41 + dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    outputs = [drawn(rows, dim).to(dtype) for _ in range(2)]
    sums = [(drawn(rows) * spread).to(wide) for _ in range(2)]
    merged, joined = outputs[0].clone(), sums[0].clone()
    function: Any = getattr(_native, f"merge_attention_{name}")
    function(
        merged.data_ptr(),
        joined.data_ptr(),
        outputs[1].data_ptr(),
        sums[1].data_ptr(),
        rows,
        dim,
    )
    for row in range(rows):
        first, second = (float(s[row]) for s in sums)
        most = max(first, second)
        total = exp(first - most) + exp(second - most)
        assert float(joined[row]) == pytest.approx(most + log(total), rel=1e-6, abs=1e-6)
        weights = [exp(value - most) / total for value in (first, second)]
        expected = sum(w * o[row].double() for w, o in zip(weights, outputs, strict=True))
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(merged[row].double(), expected, rtol=near, atol=near)
        alone, sum_alone = outputs[0][row].clone(), sums[0][row : row + 1].clone()
        other, other_sum = outputs[1][row].clone(), sums[1][row : row + 1].clone()
        function(
            alone.data_ptr(), sum_alone.data_ptr(), other.data_ptr(), other_sum.data_ptr(), 1, dim
        )
        assert alone.equal(merged[row]), "a row's bits depend on the row alone"
        assert sum_alone[0].equal(joined[row])


def test_merge_leaves_the_second_part_as_it_is() -> None:
    q, k, v, _ = tensors(torch.float32)
    first = attend(q, k[:, :, :20], v[:, :, :20], causal=False)
    second = attend(q, k[:, :, 20:], v[:, :, 20:], causal=False)
    kept = Attended(second.output.clone(), second.logsumexp.clone())
    merged = merge(first, second)
    whole = attend(q, k, v, causal=False)
    torch.testing.assert_close(merged.output, whole.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.logsumexp, whole.logsumexp, rtol=1e-6, atol=1e-6)
    assert second.output.equal(kept.output)
    assert second.logsumexp.equal(kept.logsumexp)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_each_slice_has_one_rank_and_work_is_balanced(ranks: int, each: int) -> None:
    count = ranks * each
    slices = [slices_of(count * 5, count, ranks, index) for index in range(ranks)]
    assert sorted(number for own in slices for number in own.own) == list(range(count))
    assert all(len(own.own) == each for own in slices)
    if count > 1 and each % 2 == 0:
        work = [sum(number + 0.5 for number in own.own) for own in slices]
        assert min(work) == max(work)
    assert [s for own in slices for s in own.whole().own] == list(range(count)) * ranks
