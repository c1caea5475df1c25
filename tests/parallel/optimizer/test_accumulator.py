"""Gradient sums: integers that no order changes, one path for every device, loud on overflow."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from holdfast.parallel.expert_parallel import LOAD_UNIT
from holdfast.parallel.layout import GradientMark
from holdfast.parallel.layout.boxes import Box
from holdfast.parallel.layout.parameters import HeldRow, Initial, ParameterSpec
from holdfast.parallel.optimizer.accumulator import (
    NONFINITE,
    OUT_OF_RANGE,
    GradientAccumulator,
)
from holdfast.parallel.optimizer.kernels.native_operations import add_integers
from holdfast.parallel.optimizer.kernels.torch_operations import fixed_point
from holdfast.parallel.optimizer.parameter_buffer import (
    ALIGNMENT_ELEMENTS,
    KeptSpans,
    ParameterBuffer,
    Span,
)

BITS = 44


def buffer_of(*parameters: nn.Parameter) -> ParameterBuffer:
    rows = []
    for number, parameter in enumerate(parameters):
        shape = tuple(parameter.shape)
        spec = ParameterSpec(
            name=f"p{number}",
            shape=shape,
            box=Box.whole(shape),
            local=f"p{number}",
            local_row=0,
            initial=Initial("constant", 0.0),
            decay=False,
            copies=(0,),
        )
        rows.append((HeldRow(number, 0, 0, spec), parameter))
    return ParameterBuffer(rows)


def accumulator_of(
    parameter: nn.Parameter, *, exact: bool = True
) -> tuple[GradientAccumulator, ParameterBuffer]:
    buffer = buffer_of(parameter)
    return GradientAccumulator(buffer, exact=exact, fraction_bits=BITS), buffer


def random_values(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(4 * torch.randn(shape, generator=generator))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_are_the_integers_that_python_computes(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(5, 7, dtype=dtype))
    accumulator, buffer = accumulator_of(parameter)
    gradients = [random_values((5, 7), seed, dtype) for seed in range(6)]
    for gradient in gradients:
        accumulator.add(parameter, gradient)
    expected = [0] * 35
    for gradient in gradients:
        for place, value in enumerate(gradient.flatten().tolist()):
            expected[place] += round(math.ldexp(value, BITS))
    assert accumulator.part(*buffer.place(parameter)).tolist() == expected
    assert accumulator.finish() == 0


def test_loads_of_large_steps_are_exact() -> None:
    """A hundred million choices of one expert are in range, and one more makes a difference."""
    parameter = nn.Parameter(torch.zeros(2))
    accumulator, _ = accumulator_of(parameter)
    for loads in (torch.full((2,), 2**23), torch.tensor([2**23, 2**23 + 1])):
        for _ in range(6):
            accumulator.add(parameter, loads * LOAD_UNIT)
    assert accumulator.finish() == 0
    found = [value / (LOAD_UNIT * 2**BITS) for value in accumulator.part(0, 2).tolist()]
    assert found == [12 * 2**23, 12 * 2**23 + 6]


def test_order_does_not_matter() -> None:
    gradients = [random_values((9, 4), seed, torch.float32) for seed in range(8)]
    results = []
    for order in (range(8), reversed(range(8)), random.Random(3).sample(range(8), 8)):
        parameter = nn.Parameter(torch.zeros(9, 4))
        accumulator, _ = accumulator_of(parameter)
        for number in order:
            accumulator.add(parameter, gradients[number])
        results.append(accumulator.sums.one)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


SPECIAL = [0.0, -0.0, 1e-45, -3e-39, 2.0**-45, 3 * 2.0**-45, 127.9, -128.1, 524287.9, -524288.0]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
)
def test_torch_operations_equal_the_kernel(values: list[float]) -> None:
    gradient = torch.tensor(values + SPECIAL, dtype=torch.float32)
    parameter = nn.Parameter(torch.zeros(gradient.numel()))
    accumulator, buffer = accumulator_of(parameter)
    accumulator.add(parameter, gradient)
    integers, flags = fixed_point(gradient, BITS)
    assert torch.equal(accumulator.part(*buffer.place(parameter)), integers)
    assert accumulator.finish() == int(flags)


@pytest.mark.parametrize(
    ("value", "flag"),
    [
        (float("nan"), NONFINITE),
        (float("inf"), NONFINITE),
        (-float("inf"), NONFINITE),
        (1e6, OUT_OF_RANGE),
    ],
)
def test_what_cannot_be_represented_raises_a_flag(value: float, flag: int) -> None:
    parameter = nn.Parameter(torch.zeros(200))
    accumulator, _ = accumulator_of(parameter)
    gradient = torch.zeros(200)
    gradient[137] = value
    accumulator.add(parameter, gradient)
    assert accumulator.finish() == flag
    assert int(fixed_point(gradient, BITS)[1]) == flag
    accumulator.clear()
    accumulator.add(parameter, torch.ones(200))
    assert accumulator.finish() == 0


def test_a_sum_that_overflows_raises_a_flag() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    accumulator, _ = accumulator_of(parameter)
    for _ in range(2):
        accumulator.add(parameter, torch.tensor([0.0, 300000.0, 0.0]))
    assert accumulator.finish() == OUT_OF_RANGE
    sums = torch.tensor([2**62, 5], dtype=torch.int64)
    assert add_integers(sums, torch.tensor([2**62, -7], dtype=torch.int64)) == OUT_OF_RANGE


def test_of_a_product_of_several_gradients_those_that_are_there_are_left_out() -> None:
    """Tokens of several ranks are one product for an expert; an interrupted step has some of it."""
    parameter = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    accumulator, buffer = accumulator_of(parameter, exact=False)
    grad_output, value = torch.randn(9, 6).double(), torch.randn(9, 5).double()
    marks = [GradientMark(4, 0, 7), GradientMark(0, 1, 7), GradientMark(2, 0, 8)]
    marks.append(GradientMark(3, 1, 8))
    told: list[nn.Parameter] = []
    accumulator.skip({parameter: {(7, 0), (8, 1)}})
    accumulator.expect({parameter: 5}, told.extend)
    accumulator.add_matmul(parameter, grad_output.split(4, dim=1), value, marks)
    assert not told
    accumulator.add_matmul(parameter, (grad_output[:1],), value[:1], [GradientMark(1, 1, 8)])
    assert told == [parameter]
    assert accumulator.included == {parameter: {(7, 1), (8, 0)}}
    sums = accumulator.part(*buffer.place(parameter)).view(6, 5)
    torch.testing.assert_close(sums, grad_output[4:6].T @ value[4:6], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_rows_add_what_autograd_computes(exact: bool, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(6, 5, dtype=dtype))
    accumulator, buffer = accumulator_of(parameter, exact=exact)
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for seed in range(3):
        grad_output = torch.randn(11, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)
        value = torch.randn(11, 5, generator=torch.Generator().manual_seed(seed + 9)).to(dtype)
        marks = [GradientMark(len(value), seed)]
        accumulator.add_matmul(parameter, grad_output.split(4, dim=1), value, marks)
        expected += grad_output.double().T @ value.double()
    rows = torch.tensor([4, 1])
    part = torch.randn(2, 5, generator=torch.Generator().manual_seed(50)).to(dtype)
    accumulator.add_rows(parameter, rows, part)
    expected[rows] += part.double()
    accumulator.finish()
    sums = accumulator.part(*buffer.place(parameter)).view(6, 5).double()
    actual = sums * 2.0**-BITS if exact else sums
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("exact", [True, False])
def test_a_new_step_forgets_the_last(exact: bool) -> None:
    parameter = nn.Parameter(torch.zeros(4))
    accumulator, buffer = accumulator_of(parameter, exact=exact)
    accumulator.add(parameter, torch.full((4,), float("inf") if exact else 7.0))
    accumulator.clear()
    assert accumulator.finish() == 0
    assert not accumulator.part(*buffer.place(parameter)).any()


@pytest.mark.parametrize("exact", [True, False])
def test_sums_are_complete_with_the_last_gradient_that_is_offered(exact: bool) -> None:
    parameter = nn.Parameter(torch.zeros(4, 2))
    accumulator, buffer = accumulator_of(parameter, exact=exact)
    complete: list[nn.Parameter] = []
    sums = accumulator.part(*buffer.place(parameter))

    def offer(micro_batch: int, *, skipped: bool = False) -> None:
        accumulator.skip({parameter: {(micro_batch, 0)}} if skipped else {})
        accumulator.begin_gradients(micro_batch)
        accumulator.add_rows(parameter, torch.tensor([1]), torch.ones(1, 2))

    accumulator.clear()
    accumulator.expect({parameter: 3}, complete.extend)
    offer(0)
    offer(1, skipped=True)
    assert complete == []
    offer(2)
    assert complete == [parameter]
    assert sums.count_nonzero() == 2
    assert accumulator.finish() == 0
    assert complete == [parameter]
    accumulator.clear()
    sums.fill_(7)  # the sums of a step before are overwritten, not cleared
    accumulator.expect({parameter: 0}, complete.extend)
    assert complete == [parameter, parameter]
    assert not sums.any()


def test_every_parameter_starts_at_a_cache_line() -> None:
    parameters = [nn.Parameter(torch.randn(n)) for n in (3, 64, 65, 1)]
    before = [parameter.detach().clone() for parameter in parameters]
    buffer = buffer_of(*parameters)
    for parameter, value in zip(parameters, before, strict=True):
        assert parameter.data_ptr() % 64 == 0
        assert buffer.place(parameter)[0] % ALIGNMENT_ELEMENTS == 0
        assert torch.equal(parameter, value)
    buffer.values.add_(1.0)
    assert torch.equal(parameters[2], before[2] + 1.0)


def test_ordinary_gradients_are_taken_and_freed() -> None:
    parameter = nn.Parameter(torch.ones(3))
    accumulator, buffer = accumulator_of(parameter)
    (parameter * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert parameter.grad is None
    sums = accumulator.part(*buffer.place(parameter))
    assert (sums.double() * 2.0**-BITS).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("exact", [True, False])
def test_sums_that_were_released_have_memory_again_in_the_next_step(exact: bool) -> None:
    parameter = nn.Parameter(torch.zeros(9, 4))
    accumulator, buffer = accumulator_of(parameter, exact=exact)
    gradients = [random_values((9, 4), seed, torch.float32) for seed in range(3)]

    def summed() -> Tensor:
        accumulator.clear()
        for gradient in gradients:
            accumulator.add(parameter, gradient)
        assert accumulator.finish() == 0
        return accumulator.sums.one.clone()

    before = summed()
    for _ in range(2):  # a change that fails is followed by another
        accumulator.release()
        assert accumulator.sums.one.untyped_storage().nbytes() == 0
        assert not accumulator.included
    assert torch.equal(summed(), before)
    accumulator.release()
    accumulator.keep(KeptSpans([Span(0, 8)]), frozenset([parameter]))
    assert accumulator.sums.one.untyped_storage().nbytes() == 0
    accumulator.keep(buffer.whole)
    assert torch.equal(summed(), before)
