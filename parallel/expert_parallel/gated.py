"""SwiGLU of the rows of an expert (Shazeer 2020), forwards and backwards. Local; exact-mode safe.

In float32 on a CPU a kernel of our own takes one pass over memory, where torch takes five.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast import _native


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: float[rows, width].

    Args:
        gate_up: float[rows, 2 width], contiguous.
    """
    if not _is_native(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    found = gate_up.new_empty(rows, width)
    _native.swiglu_f32(gate_up.data_ptr(), found.data_ptr(), rows, width)
    return found


def swiglu_backward(gradient: Tensor, gate_up: Tensor, found: Tensor, by_gate_up: Tensor) -> None:
    """Write the gradient by `gate_up` to `by_gate_up`, and SwiGLU's value to `found` again.

    Args:
        gradient: float[rows, width] by the value. All are contiguous.
    """
    if _is_native(gate_up):
        _native.swiglu_backward_f32(
            gradient.data_ptr(),
            gate_up.data_ptr(),
            found.data_ptr(),
            by_gate_up.data_ptr(),
            *found.shape,
        )
        return
    (gate, up), (by_gate, by_up) = gate_up.chunk(2, -1), by_gate_up.chunk(2, -1)
    activated = F.silu(gate)
    torch.mul(activated, up, out=found)
    torch.mul(gradient, activated, out=by_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=by_gate)


def _is_native(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32
