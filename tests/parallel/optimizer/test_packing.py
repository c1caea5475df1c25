"""Packed gradient sums as tensors: they come back, and unfit tensors are refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from holdfast.parallel.optimizer.kernels import OUT_OF_RANGE
from holdfast.parallel.optimizer.kernels.native_operations import add_integers
from holdfast.parallel.optimizer.packing import (
    SMALLEST_PACKED,
    pack,
    packed_bytes_bound,
    unpack_add,
)


def packed_form(sums: Tensor) -> Tensor:
    out = torch.empty(packed_bytes_bound(sums.numel()), dtype=torch.uint8)
    return out[: pack(sums, out)]


@pytest.mark.parametrize("count", [1, SMALLEST_PACKED, 12345])
def test_packed_sums_add_up_like_the_sums_themselves(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    sums, base = (torch.randint(-(2**37), 2**37, (count,), generator=generator) for _ in range(2))
    packed = packed_form(sums)
    assert packed.numel() <= 5.02 * count + 8

    out = torch.empty_like(sums)
    assert unpack_add(packed, None, out) == 0
    assert torch.equal(out, sums)
    assert unpack_add(packed, base, out) == 0
    assert torch.equal(out, base + sums)
    base[-1] = 2**63 - 1
    sums[-1] = 1
    wanted = base.clone()
    assert add_integers(wanted, sums) == OUT_OF_RANGE
    assert unpack_add(packed_form(sums), base, base) == OUT_OF_RANGE
    assert torch.equal(base, wanted)


def test_packing_costs_at_most_a_hundredth_from_the_smallest_number_on() -> None:
    largest = torch.full((5000,), -(2**63))
    for count in (SMALLEST_PACKED, SMALLEST_PACKED + 1, 4096, 4097, 5000):
        assert packed_form(largest[:count]).numel() <= 1.01 * 8 * count


def test_unfit_tensors_are_refused_by_name() -> None:
    sums, out = torch.zeros(8, dtype=torch.int64), torch.zeros(100, dtype=torch.uint8)
    packed = packed_form(sums)
    for call, sentence in (
        (lambda: pack(sums.int(), out), "sums is torch.int32 and contiguous; it must be"),
        (lambda: pack(sums[::2], out), "sums is torch.int64 and not contiguous; it must be"),
        (lambda: pack(sums, sums), "out is torch.int64"),
        (lambda: pack(sums, out[:71]), "out has 71 bytes; 8 packed sums can take 72"),
        (lambda: pack(sums.to("meta"), out), "sums is on meta; sums are packed"),
        (lambda: unpack_add(packed.to("meta"), None, sums), "packed is on meta; sums are"),
        (lambda: unpack_add(packed, sums[:7], sums), "base has 7 elements, out 8"),
        (lambda: unpack_add(packed, None, sums[::2]), "out is torch.int64 and not contiguous"),
        (lambda: unpack_add(packed[:7], None, sums), "there are 7"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call()
