"""Numbers change their type as torch changes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.checkpoint.convert.elements.arrays import Bits, bits, cast, combine, number
from holdfast.checkpoint.format.dtypes import TORCH_DTYPES

FLOATS = ("F32", "BF16", "F16", "F64", "F8_E4M3")


def bits_of(tensor: torch.Tensor, dtype: str) -> Bits:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return bits(content, dtype).reshape(tuple(tensor.shape))


@pytest.fixture(scope="module")
def patterns() -> torch.Tensor:
    """Random bits, all exponents, ends of ranges, ties and what is no number."""
    generator = torch.Generator().manual_seed(4)
    random = torch.randint(-(2**31), 2**31, (20000,), generator=generator, dtype=torch.int64)
    ties = (torch.arange(-2000, 2000) << 16) + 0x8000
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519.9, 65520])
    given = torch.cat([random, ties]).to(torch.int32).view(torch.float32)
    return torch.cat([given, special]).view(-1, 4)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_rounding_is_torchs(patterns: torch.Tensor, source: str, target: str) -> None:
    values = patterns.to(TORCH_DTYPES[source])
    expected = values.to(TORCH_DTYPES[target])
    found = cast(bits_of(values, source), source, target)
    assert found.shape == values.shape
    same = torch.from_numpy(found.view(np.uint8).copy()).view(TORCH_DTYPES[target])
    torch.testing.assert_close(same, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
@pytest.mark.parametrize("mean", [False, True])
def test_sums_are_torchs(dtype: str, mean: bool) -> None:
    parts = torch.randn(3, 5, 7).to(TORCH_DTYPES[dtype])
    total = parts[0] + parts[1] + parts[2]
    expected = (total / 3 if mean else total).bfloat16()
    found = combine([bits_of(part, dtype) for part in parts], dtype, "BF16", mean=mean)
    assert np.array_equal(found, bits_of(expected, "BF16"))


def test_a_number_is_what_its_bytes_say() -> None:
    for dtype, value in (("F32", 1.5), ("BF16", -3.0), ("I64", 1 << 40), ("BOOL", True)):
        content = torch.tensor([value], dtype=TORCH_DTYPES[dtype]).view(torch.uint8)
        assert number(content.numpy().tobytes(), dtype) == value
