"""Gradient sums over micro-batches: integers in exact mode, floats in fast mode.

Exact mode adds round(g * 2**fraction_bits) to an int64 accumulator. Integer addition is
associative, so the sum depends neither on the rank that computed a micro-batch nor on the order.
Fast mode adds in the gradient's accumulation dtype, in the order of computation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from holdfast import _native
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.precision import precision_of

NONFINITE = 1
OUT_OF_RANGE = 2

_ACCUMULATE = {
    torch.float32: _native.accumulate_f32,
    torch.bfloat16: _native.accumulate_bf16,
    torch.float64: _native.accumulate_f64,
}
_ACCUMULATE_ROWS = {
    torch.float32: _native.accumulate_rows_f32,
    torch.bfloat16: _native.accumulate_rows_bf16,
    torch.float64: _native.accumulate_rows_f64,
}


def fixed_point(gradient: Tensor, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """The int64 fixed-point form of `gradient` by torch operations, for devices without the kernel.

    Args:
        gradient: float of any dtype and shape.
    Returns:
        int64 of the same shape (zero where it cannot be represented), and flags: int64 scalar,
        NONFINITE | OUT_OF_RANGE. Bit-equal to the native kernel.
    """
    scaled = torch.round(gradient.double() * 2.0**fraction_bits)
    finite = torch.isfinite(scaled)
    fits = scaled.abs() < 2.0**63
    usable = finite & fits
    flags = (~torch.isfinite(gradient)).any().long() * NONFINITE
    flags = flags + (torch.isfinite(gradient) & ~fits).any().long() * OUT_OF_RANGE
    return torch.where(usable, scaled, 0.0).to(torch.int64), flags


def add_integers(sums: Tensor, other: Tensor) -> int:
    """Add `other` to `sums`, int64 of one shape. Returns OUT_OF_RANGE if any sum overflowed."""
    if sums.device.type == "cpu":
        return _native.add_i64(sums.data_ptr(), other.data_ptr(), sums.numel())
    before = sums.clone()
    sums.add_(other)
    overflow = ((before ^ sums) & (other ^ sums)) < 0
    return OUT_OF_RANGE if bool(overflow.any()) else 0


class GradientSource(Protocol):
    """The source of gradients; `WeightGradientQueue`."""

    def subscribe(self, sink: GradientAccumulator, /) -> None:
        """Hand all gradients to `sink` from now on."""
        ...


class GradientAccumulator:
    """The `GradientSink` of one rank: a flat buffer of sums laid out like the rank's parameters.

    `exact` selects the arithmetic; see the module's docstring. Local.
    """

    def __init__(
        self,
        buffer: ParameterBuffer,
        *,
        exact: bool,
        fraction_bits: int,
        queues: Iterable[GradientSource] = (),
    ) -> None:
        """Subscribe to the gradients of all parameters of `buffer`. Local.

        Args:
            queues: the queues that bring weight gradients here past autograd.
        """
        self.exact = exact
        self.fraction_bits = fraction_bits
        self._buffer = buffer
        values = buffer.values
        dtype = torch.int64 if exact else precision_of(values.dtype).state.dtype
        self.sums: Tensor = torch.zeros(values.shape, dtype=dtype, device=values.device)
        self.flags = 0
        self._micro_batch = -1
        """The micro-batch whose gradients are being added."""
        self._skipped: frozenset[nn.Parameter] = frozenset()
        self.included: dict[nn.Parameter, set[int]] = {}
        """The micro-batches whose gradients have been added since `clear`."""
        self._device_flags: Tensor | None = None
        if values.device.type != "cpu":
            self._device_flags = torch.zeros((), dtype=torch.int64, device=values.device)
        largest = max((parameter.numel() for parameter in buffer.parameters), default=0)
        self._scratch = torch.empty(
            largest if exact else 0, dtype=values.dtype, device=values.device
        )
        self._empty: set[nn.Parameter] = set(buffer.parameters)
        self._views = {
            p: self.sums[slice(*buffer.place(p))].view(p.shape) for p in buffer.parameters
        }
        for parameter in buffer.parameters:
            parameter.register_post_accumulate_grad_hook(self._take_ordinary_gradient)
        for queue in queues:
            queue.subscribe(self)

    def begin_gradients(self, micro_batch: int, skipped: frozenset[nn.Parameter]) -> None:
        """Before a micro-batch's gradients; those of `skipped` parameters are not added again."""
        self._micro_batch, self._skipped = micro_batch, skipped

    def clear(self) -> None:
        """Clear all sums and flags at the start of a step."""
        self.flags = 0
        self.included.clear()
        if self._device_flags is not None:
            self._device_flags.zero_()
        if self.exact:
            self.sums.zero_()
        else:
            self._empty = set(self._buffer.parameters)

    def finish(self) -> int:
        """Complete `sums` after a step's last backward. Returns the flags."""
        for parameter in self._empty if not self.exact else ():
            self._views[parameter].zero_()
        self._empty = set()
        if self._device_flags is not None:
            self.flags |= int(self._device_flags)
        return self.flags

    def _include(self, parameter: nn.Parameter) -> None:
        self.included.setdefault(parameter, set()).add(self._micro_batch)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a whole local parameter's gradient (of its shape, any float dtype)."""
        if parameter in self._skipped:
            return
        self._include(parameter)
        if self.exact:
            self._add_exact(parameter, gradient.contiguous())
        elif parameter in self._empty:
            self._empty.discard(parameter)
            self._views[parameter].copy_(gradient)
        else:
            self._views[parameter].add_(gradient)

    def add_matmul(self, parameter: nn.Parameter, grad_output: Tensor, value: Tensor) -> None:
        """Add grad_output.T @ value: float[tokens, out], float[tokens, in], of its dtype."""
        if parameter in self._skipped:
            return
        self._include(parameter)
        transposed = grad_output.t()
        if self.exact:
            gradient = self._scratch[: parameter.numel()].view(parameter.shape)
            torch.mm(transposed, value, out=gradient)
            self._add_exact(parameter, gradient)
        elif self.sums.dtype != grad_output.dtype:
            self.add(parameter, transposed @ value)
        elif parameter in self._empty:
            self._empty.discard(parameter)
            torch.mm(transposed, value, out=self._views[parameter])
        else:
            self._views[parameter].addmm_(transposed, value)

    def add_rows(self, parameter: nn.Parameter, rows: Tensor, gradient: Tensor) -> None:
        """Add to some rows only: rows int64[k], distinct; gradient float[k, ...]."""
        if parameter in self._skipped:
            return
        self._include(parameter)
        if not self.exact:
            if parameter in self._empty:
                self._empty.discard(parameter)
                self._views[parameter].zero_()
            self._views[parameter].index_add_(0, rows, gradient.to(self.sums.dtype))
        elif self.sums.device.type == "cpu":
            rows, gradient = rows.contiguous(), gradient.contiguous()
            kernel = _ACCUMULATE_ROWS.get(gradient.dtype)
            if kernel is None:  # float32 holds the values of all narrower types
                gradient, kernel = gradient.float(), _native.accumulate_rows_f32
            self.flags |= kernel(
                self._views[parameter].data_ptr(),
                gradient.data_ptr(),
                rows.data_ptr(),
                rows.numel(),
                gradient[0].numel() if rows.numel() else 0,
                self.fraction_bits,
            )
        else:
            integers, flags = fixed_point(gradient, self.fraction_bits)
            view = self._views[parameter]
            selected = view.index_select(0, rows)
            total = selected + integers
            view.index_copy_(0, rows, total)
            self._note(flags, selected, integers, total)

    def add_to(self, total: Tensor, other: Tensor) -> int:
        """Add `other` to `total`, parts of sums of one shape. Returns OUT_OF_RANGE on overflow."""
        if self.exact:
            return add_integers(total, other)
        total.add_(other)
        return 0

    def read(self, start: int, stop: int, gradient: Tensor) -> float:
        """Write elements [start, stop) of complete sums to `gradient` as floats.

        Args:
            gradient: float32 or float64 [stop - start], contiguous.
        Returns:
            The sum of squares, in float64.
        """
        sums = self.sums[start:stop]
        double = gradient.dtype == torch.float64
        if gradient.device.type != "cpu":
            if self.exact:
                torch.mul(sums.double(), 2.0**-self.fraction_bits, out=gradient)
            else:
                gradient.copy_(sums)
            return float(gradient.double().square().sum())
        pointers = (sums.data_ptr(), gradient.data_ptr(), gradient.numel())
        if self.exact:
            convert = _native.reduce_convert_f64 if double else _native.reduce_convert_f32
            return convert(*pointers, self.fraction_bits)
        gradient.copy_(sums)
        squares = _native.sum_squares_f64 if double else _native.sum_squares_f32
        return squares(gradient.data_ptr(), gradient.numel())

    def _add_exact(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        view = self._views[parameter]
        if view.device.type == "cpu":
            kernel = _ACCUMULATE.get(gradient.dtype)
            if kernel is None:  # float32 holds the values of all narrower types
                gradient, kernel = gradient.float(), _native.accumulate_f32
            self.flags |= kernel(
                view.data_ptr(), gradient.data_ptr(), gradient.numel(), self.fraction_bits
            )
            return
        integers, flags = fixed_point(gradient, self.fraction_bits)
        before = view.clone()
        view.add_(integers)
        self._note(flags, before, integers, view)

    def _note(self, flags: Tensor, before: Tensor, added: Tensor, total: Tensor) -> None:
        assert self._device_flags is not None
        overflow = (((before ^ total) & (added ^ total)) < 0).any().long() * OUT_OF_RANGE
        self._device_flags |= flags | overflow

    def _take_ordinary_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter.grad is not None:
            self.add(parameter, parameter.grad)
            parameter.grad = None
