"""SwiGLU and its gradients, beside torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast import _native


def forward(gate_up: Tensor) -> Tensor:
    found = torch.empty(len(gate_up), gate_up.shape[1] // 2)
    _native.swiglu_f32(gate_up.data_ptr(), found.data_ptr(), *found.shape)
    return found


def backward(gradient: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    found, by_gate_up = torch.empty_like(gradient), torch.empty_like(gate_up)
    _native.swiglu_backward_f32(
        gradient.data_ptr(),
        gate_up.data_ptr(),
        found.data_ptr(),
        by_gate_up.data_ptr(),
        *found.shape,
    )
    return found, by_gate_up


def drawn(rows: int, width: int, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * width)
    gate_up = torch.randn(rows, 2 * width, generator=generator) * scale
    return gate_up, torch.randn(rows, width, generator=generator)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 60.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (7, 48), (40, 257)])
def test_values_and_gradients_are_those_of_torch(rows: int, width: int, scale: float) -> None:
    gate_up, gradient = drawn(rows, width, scale)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = F.silu(gate) * up
    expected.backward(gradient.double())
    assert exact.grad is not None
    found, by_gate_up = backward(gradient, gate_up)
    assert torch.equal(found, forward(gate_up))
    near = {"rtol": 2e-6, "atol": 1e-6 * scale}
    torch.testing.assert_close(found.double(), expected.detach(), **near)
    torch.testing.assert_close(by_gate_up.double(), exact.grad, **near)


def test_it_is_as_near_as_torch_in_float32() -> None:
    """The largest error of a value, in units of the last place."""
    gate = torch.linspace(-30.0, 30.0, 400_001)
    gate_up = torch.stack([gate, torch.ones_like(gate)], 1)
    exact = F.silu(gate.double())
    place = torch.finfo(torch.float32).eps * exact.abs()
    ours, theirs = (
        ((values.double() - exact).abs() / place).max()
        for values in (forward(gate_up).flatten(), F.silu(gate))
    )
    assert ours < max(4.0, 2.0 * float(theirs))


def test_far_gates_have_the_limits_and_what_is_no_number_stays_it() -> None:
    gate_up = torch.tensor([[3e38, -1e30, torch.inf, torch.nan, 2.0, 2.0, 2.0, 2.0]])
    far, near_zero, infinite, none = forward(gate_up)[0].tolist()
    assert far == torch.inf  # twice the largest number
    assert abs(near_zero) < 1.0
    assert infinite == torch.inf
    assert none != none
    _, by = backward(torch.ones(1, 4), gate_up)
    assert by[0, 3] != by[0, 3]


def test_an_element_does_not_depend_on_its_place() -> None:
    gate_up, gradient = drawn(9, 67, 3.0)
    whole, by_whole = backward(gradient, gate_up)
    for row in range(9):
        one, by_one = backward(gradient[row : row + 1].clone(), gate_up[row : row + 1].clone())
        assert torch.equal(one[0], whole[row])
        assert torch.equal(by_one[0], by_whole[row])
    shifted = torch.cat([gate_up[:, 5:67], gate_up[:, 72:]], 1).contiguous()
    assert torch.equal(forward(shifted), whole[:, 5:])


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="width -2; neither may be negative"):
        _native.swiglu_f32(0, 0, 1, -2)
    assert forward(torch.empty(0, 8)).shape == (0, 4)
