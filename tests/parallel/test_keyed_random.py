"""Random numbers without state: named by keys and places, equal on every device and in every
shard.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from holdfast import _native
from holdfast.parallel.keyed_random import dropout, normal_box_, philox_uint32, stream_key

CPU = torch.device("cpu")


@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 2**31))
def test_torch_operations_draw_what_the_kernel_draws(offset: int, count: int, seed: int) -> None:
    key = stream_key(seed, "test", 3)
    native = torch.empty(count, dtype=torch.uint32)
    _native.philox_uint32(native.data_ptr(), count, key.key, key.stream, offset)
    assert philox_uint32(count, key, offset, CPU).tolist() == native.tolist()


def test_keys_of_different_names_differ() -> None:
    names = [(1, "a", 2), (1, "a", "2"), (1, "a2"), (2, "a", 2), (1, 2, "a"), (1, "a", 2, 0)]
    assert len({stream_key(seed, *parts) for seed, *parts in names}) == len(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 7, 96])
def test_a_shard_draws_its_own_part_of_the_mask(dtype: torch.dtype, cut: int) -> None:
    key = stream_key(7, "dropout", 1, 2, "3", "mlp")
    value = torch.randn(193).to(dtype)
    whole = dropout(value, key, offset=0, probability=0.3)
    parts = [
        dropout(value[:cut], key, offset=0, probability=0.3),
        dropout(value[cut:], key, offset=cut, probability=0.3),
    ]
    assert torch.equal(torch.cat(parts), whole)
    kept = whole != 0
    scaled = (value.double() / 0.7)[kept]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(whole.double()[kept], scaled, rtol=tolerance, atol=0)


def test_dropout_keeps_the_asked_share() -> None:
    kept = dropout(torch.ones(200_000), stream_key(1, "share"), offset=0, probability=0.25)
    assert abs(float((kept == 0).double().mean()) - 0.25) < 0.005
    assert abs(float(kept.mean()) - 1.0) < 0.01


def test_dropout_by_torch_operations_has_the_same_mask() -> None:
    key = stream_key(3, "mask")
    draws = philox_uint32(1000, key, 40, CPU)
    native = dropout(torch.ones(1000), key, offset=40, probability=0.1)
    assert torch.equal(native != 0, draws >= int(0.1 * 2**32))


def test_a_box_draws_its_part_of_the_matrix() -> None:
    key = stream_key(5, "weight")
    whole = torch.empty(12, 10)
    normal_box_(whole, key, row=0, column=0, total_columns=10, std=0.02)
    part = torch.empty(4, 3)
    normal_box_(part, key, row=5, column=6, total_columns=10, std=0.02)
    assert torch.equal(part, whole[5:9, 6:9])
    assert 0.01 < float(whole.std()) < 0.03


def test_nothing_touches_torch_s_generator() -> None:
    before = torch.random.get_rng_state()
    dropout(torch.ones(100), stream_key(1, "x"), offset=0, probability=0.5)
    normal_box_(torch.empty(3, 3), stream_key(1), row=0, column=0, total_columns=3, std=1.0)
    assert torch.equal(torch.random.get_rng_state(), before)
