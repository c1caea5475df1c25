"""Gradient sums over micro-batches: integers in exact mode, floats in fast mode.

Exact mode adds round(g * 2**fraction_bits) to an int64 accumulator. Integer addition is
associative, so the sum depends neither on the rank that computed a micro-batch nor on the order.
Fast mode adds in the gradient's accumulation dtype, in the order of computation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from holdfast.parallel.layout import GradientMark, Slices
from holdfast.parallel.optimizer.flat_values import FlatValues, one_piece
from holdfast.parallel.optimizer.kernels import (
    NONFINITE as NONFINITE,
    OUT_OF_RANGE as OUT_OF_RANGE,
    ContributionDigests,
    operations_of,
)
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer, Segment
from holdfast.parallel.optimizer.spans import KeptSpans, Span
from holdfast.parallel.precision import precision_of


def _untold(parameters: Iterable[nn.Parameter]) -> None:
    """What is called with complete parameters while no step runs."""


class GradientSource(Protocol):
    """The source of gradients; `WeightGradientQueue`."""

    def subscribe(self, sink: GradientAccumulator, /) -> None:
        """Hand all gradients to `sink` from now on."""
        ...


Skipped = Mapping[nn.Parameter, Set[tuple[int, int]]]
"""By parameter: the gradients that its sums include already: (micro-batch, number in it)."""
Share = Callable[[int, nn.Parameter, Tensor], None]
"""Takes a slice's gradient of a parameter, which is not changed any more: the slices of a
micro-batch one after another."""


def _keep_whole(micro_batch: int, parameter: nn.Parameter, gradient: Tensor) -> None:
    """What takes shared gradients while no step runs."""
    raise RuntimeError("a gradient of a shared parameter was computed outside of a step")


class GradientAccumulator:
    """The `GradientSink` of one rank: flat tensors of the sums that the rank keeps.

    `exact` selects the arithmetic; see the module's docstring. Local. Its attributes are the sums
    and their views, the arithmetic, and what the running step has brought and still brings.
    """

    def __init__(
        self,
        buffer: ParameterBuffer,
        *,
        exact: bool,
        fraction_bits: int,
        queues: Iterable[GradientSource] = (),
        kept: KeptSpans | None = None,
        slices: Slices | None = None,
        released: bool = False,
    ) -> None:
        """Subscribe to the gradients of all parameters of `buffer`. Local.

        Args:
            queues: the queues that bring weight gradients here past autograd.
            kept: as for `keep`; None: all sums.
            slices: the slices of a sequence; each own one brings gradients. None: there is one.
            released: as after `release`.
        """
        self.exact = exact
        self.slices = slices or Slices()
        self.fraction_bits = fraction_bits
        self._buffer = buffer
        dtype = torch.int64 if exact else precision_of(buffer.dtype).state.dtype
        self.sums = FlatValues((), partial(torch.empty, dtype=dtype, device=buffer.device))
        """The sums of what is kept, in the pieces of `buffer` if that is all."""
        self.kept = KeptSpans([])
        """What `sums` has of the index space of `buffer`."""
        self._shared: frozenset[nn.Parameter] = frozenset()
        """The parameters whose gradients go to the ranks that keep their sums."""
        self._share: Share = _keep_whole
        self._flags = torch.zeros((), dtype=torch.int64, device=buffer.device)
        self._operations = operations_of(buffer.device)
        self._micro_batch = -1
        """The micro-batch whose gradients are being added."""
        self._skipped: Skipped = {}
        self.included: dict[nn.Parameter, set[tuple[int, int]]] = {}
        """The gradients that have been added since `clear`: (micro-batch, number in it)."""
        self._left: dict[nn.Parameter, int] = {}
        """The number of gradients that a parameter is still offered in this step."""
        self._complete: Callable[[Iterable[nn.Parameter]], None] = _untold
        self._watched: ContributionDigests | None = None
        self._scratch = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        self._empty: set[nn.Parameter] = set()
        """The parameters whose sums are zero, whatever stands in `sums`."""
        self._released = released
        self._views: dict[nn.Parameter, Tensor] = {}
        self.keep(buffer.whole if kept is None else kept)
        # Parameters hold their hooks where Python's garbage collector does not look: a model would
        # stay in memory for ever after the change of plan that replaced it.
        here: weakref.ref[GradientAccumulator] = weakref.ref(self)
        for parameter in buffer.parameters:
            parameter.register_post_accumulate_grad_hook(partial(_take_ordinary_gradient, here))
        for queue in queues:
            queue.subscribe(self)

    def keep(self, kept: KeptSpans, shared: frozenset[nn.Parameter] = frozenset()) -> None:
        """Keep the sums of these elements from now on. Sums that are here are lost if they differ.

        Args:
            shared: the parameters that are not kept whole: their gradients are handed on.
        """
        if kept == self.kept and shared == self._shared and self._views:
            return  # what an interrupted step has summed stays
        self._shared = shared
        if kept != self.kept:
            self.kept = kept
            self._lay_out(None)
        else:
            self._look_at_sums()
        self._empty = set(self._views)
        largest = max((parameter.numel() for parameter in self._views), default=0)
        self._scratch = self._scratch.new_empty(largest if self.exact else 0)

    def _lay_out(self, before: FlatValues | None) -> None:
        """Make the sums that are kept: zeros, or without memory; whole pieces are those before."""
        is_whole = self.kept == self._buffer.whole
        pieces = self._buffer.pieces if is_whole else one_piece(self.kept)
        dtype, device, made = self.sums.dtype, self.sums.device, list[Tensor]()

        def make(elements: int) -> Tensor:
            new = torch.empty if self._released else torch.zeros
            made.append(new(elements, dtype=dtype, device=device))
            return made[-1]

        self.sums = FlatValues(pieces, make, before)
        self._look_at_sums()  # before their memory is freed
        for values in made if self._released else ():
            values.untyped_storage().resize_(0)

    def _look_at_sums(self) -> None:
        own = [p for p in self._buffer.parameters if self.kept.elements and p not in self._shared]
        self._views = {p: self.part(*self._buffer.place(p)).view(p.shape) for p in own}

    def release(self) -> None:
        """Free the memory of the sums until `clear`, and forget what they include."""
        if not self._released:
            self.clear()
            self._released = True
            for values in self.sums.tensors:
                values.untyped_storage().resize_(0)

    def part(self, start: int, stop: int) -> Tensor:
        """The kept sums [start, stop): a view of `sums`."""
        return self.sums.part(start, stop)

    def parts(self, spans: Iterable[Span]) -> list[Tensor]:
        """The kept sums of spans, one after another: views."""
        return self.sums.parts(spans)

    def skip(self, skipped: Skipped) -> None:
        """Add the gradients `skipped` not again, until `clear`."""
        self._skipped = skipped

    def watch(self, digests: ContributionDigests | None) -> None:
        """Have digests of one micro-batch's gradients taken from now on; None: of none."""
        self._watched = digests

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Put the sums aside for the length of the block, which begins without any.

        They are copied, so they are twice in memory.
        """
        kept = [values.clone() for values in self.sums.tensors]
        flags, skipped, empty = self._flags.clone(), self._skipped, self._empty
        included = {parameter: set(units) for parameter, units in self.included.items()}
        self.clear()
        try:
            yield
        finally:
            for values, before in zip(self.sums.tensors, kept, strict=True):
                values.copy_(before)
            self._flags.copy_(flags)
            self._skipped, self._empty, self.included = skipped, empty, included

    @contextmanager
    def _noted(self, parameter: nn.Parameter) -> Iterator[None]:
        """Note in digests what the block adds, if it is of the micro-batch that is watched."""
        watched = self._watched
        if watched is None or watched.micro_batch != self._micro_batch:
            yield
            return
        sums = self._views[parameter]
        before = watched.before(parameter, sums, first=parameter in self._empty)
        yield
        watched.after(parameter, sums, before)

    def begin_gradients(self, micro_batch: int) -> None:
        """Before a micro-batch's gradients."""
        self._micro_batch = micro_batch

    def clear(self) -> None:
        """Clear all sums and flags at the start of a step; first gradients replace what is here."""
        if self._released:
            self._released = False
            for values in self.sums.tensors:
                if not values.untyped_storage().nbytes():
                    values.untyped_storage().resize_(values.nbytes)
                    values.zero_()
        self._skipped = {}
        self._flags.zero_()
        self.included.clear()
        self._empty = set(self._views)

    def take_over(
        self,
        other: GradientAccumulator,
        segments: Iterable[tuple[Segment, Segment, Callable[[int], int]]],
    ) -> None:
        """Take the sums of another accumulator of this rank, with what they include.

        Whole pieces stay where they lie, and are those of both.

        Args:
            segments: a segment here, the same elements there, and the number here of a gradient
                with a number there. All segments of a parameter are there, or none.
        """
        if self.kept == self._buffer.whole and not other._released:
            self._lay_out(other.sums)
        self.clear()
        self._flags.copy_(other._flags)
        for here, there, unit_of in segments:
            added = other.included.get(there.parameter)
            if not added:
                continue
            count = here.spec.elements
            sums = other.part(there.offset, there.offset + count)
            target = self.part(here.offset, here.offset + count)
            is_first = self._is_first(here.parameter)
            if target.data_ptr() != sums.data_ptr():
                if is_first:
                    self._views[here.parameter].zero_()  # padding between segments included
                target.copy_(sums)
            units = {(micro_batch, unit_of(unit)) for micro_batch, unit in added}
            self.included.setdefault(here.parameter, set()).update(units)

    def expect(
        self,
        offers: Mapping[nn.Parameter, int],
        complete: Callable[[Iterable[nn.Parameter]], None],
        share: Share = _keep_whole,
    ) -> None:
        """Say how many gradients each parameter is offered from now on, skipped ones included.

        Args:
            offers: the number for each parameter of the buffer.
            complete: called, from the thread that adds, with parameters that get no more of them;
                not with shared ones.
            share: takes the gradients of shared parameters.
        """
        self._left, self._complete, self._share = dict(offers), complete, share
        self._end([parameter for parameter, count in offers.items() if not count])

    def finish(self) -> int:
        """Complete `sums` after a step's last backward. Returns the flags."""
        self._end([*self._left, *(self._empty - self._left.keys())])
        self.forget()
        return int(self._flags)

    def forget(self) -> None:
        """Tell nothing more of this step.

        Between steps this object refers to nothing that has connections.
        """
        self._left, self._complete, self._share = {}, _untold, _keep_whole

    def _end(self, parameters: Iterable[nn.Parameter]) -> None:
        """Complete the sums of parameters that get no more gradients in this step."""
        for parameter in parameters:
            if parameter in self._empty:
                self._empty.discard(parameter)
                self._views[parameter].zero_()
            self._left.pop(parameter, None)
        self._complete([p for p in parameters if p not in self._shared])

    def _takes(self, parameter: nn.Parameter, unit: int, micro_batch: int | None = None) -> bool:
        """Note the offer of a gradient. Returns whether it is to be added."""
        key = (self._micro_batch if micro_batch is None else micro_batch, unit)
        if key in self._skipped.get(parameter, ()):
            return False
        self.included.setdefault(parameter, set()).add(key)
        return True

    def pass_over(self, parameter: nn.Parameter, count: int) -> None:
        """Count offers of gradients that other ranks have."""
        if count:
            self._offered(parameter, count)

    def _offered(self, parameter: nn.Parameter, count: int = 1) -> None:
        """Count offers that have been taken or skipped."""
        left = self._left.get(parameter, 0) - count
        if left > 0:
            self._left[parameter] = left
        elif left == 0:
            self._end([parameter])

    def add(self, parameter: nn.Parameter, gradient: Tensor, unit: int = 0) -> None:
        """Add a whole local parameter's gradient (of its shape, any float dtype)."""
        if self._takes(parameter, unit):
            self._add(parameter, gradient)
        self._offered(parameter)

    def _add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if parameter in self._shared:
            self._share(self._micro_batch, parameter, gradient.contiguous())
        elif self.exact:
            self._add_exact(parameter, gradient.contiguous())
        elif self._is_first(parameter):
            self._views[parameter].copy_(gradient)
        else:
            self._views[parameter].add_(gradient)

    def _is_first(self, parameter: nn.Parameter) -> bool:
        """Whether a gradient that is added now is its parameter's first."""
        first = parameter in self._empty
        self._empty.discard(parameter)
        return first

    def add_matmul(
        self,
        parameter: nn.Parameter,
        grad_output: Iterable[Tensor],
        value: Tensor,
        marks: Sequence[GradientMark],
    ) -> None:
        """Add grad_output.T @ value: float[tokens, out], float[tokens, in], of its dtype.

        Args:
            grad_output: blocks of its columns, from the first to the last.
            marks: those of the gradients of which it is the sum. Exact mode and shared parameters
                have one at a time. A micro-batch None is the one of `begin_gradients`.
        """
        taken = [self._takes(parameter, mark.unit, mark.micro_batch) for mark in marks]
        if any(taken) and not all(taken):
            counts = torch.tensor([mark.tokens for mark in marks], device=value.device)
            chosen = torch.tensor(taken, device=value.device).repeat_interleave(counts)
            value, grad_output = value[chosen], (block[chosen] for block in grad_output)
        # Without tokens nothing is added, but it counts: an expert has a gradient in every slice.
        if any(taken) and (len(value) or parameter in self._shared):
            self._add_matmul(parameter, grad_output, value)
        self._offered(parameter, len(marks))

    def _add_matmul(
        self, parameter: nn.Parameter, grad_output: Iterable[Tensor], value: Tensor
    ) -> None:
        shares = parameter in self._shared
        if shares:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        elif self.exact:
            whole = self._scratch[: parameter.numel()].view(parameter.shape)
        else:
            whole = self._views[parameter]
        writes = shares or self.exact or self._is_first(parameter)
        start = 0
        for block in grad_output:
            rows, transposed = whole[start : start + block.shape[1]], block.t()
            start += block.shape[1]
            if rows.dtype != block.dtype:
                product = transposed @ value
                _ = rows.copy_(product) if writes else rows.add_(product)
            elif writes:
                torch.mm(transposed, value, out=rows)
            else:
                rows.addmm_(transposed, value)
        if shares:
            self._share(self._micro_batch, parameter, whole)
        elif self.exact:
            self._add_exact(parameter, whole)

    def add_rows(
        self, parameter: nn.Parameter, rows: Tensor, gradient: Tensor, unit: int = 0
    ) -> None:
        """Add to some rows only: rows int64[k], distinct; gradient float[k, ...]."""
        if self._takes(parameter, unit):
            self._add_rows(parameter, rows, gradient)
        self._offered(parameter)

    def _add_rows(self, parameter: nn.Parameter, rows: Tensor, gradient: Tensor) -> None:
        if parameter in self._shared:
            whole = torch.zeros(parameter.shape, dtype=gradient.dtype, device=gradient.device)
            self._share(self._micro_batch, parameter, whole.index_copy_(0, rows, gradient))
            return
        with self._noted(parameter):
            if self._is_first(parameter):
                self._views[parameter].zero_()
            if not self.exact:
                self._views[parameter].index_add_(0, rows, gradient.to(self.sums.dtype))
            else:
                self._operations.accumulate_rows(
                    self._views[parameter],
                    rows.contiguous(),
                    gradient.contiguous(),
                    self.fraction_bits,
                    self._flags,
                )

    def add_kept(
        self, spans: Sequence[Span], gradient: Tensor, flags: Tensor, *, first: bool
    ) -> None:
        """Add a gradient to kept sums, also those of other ranks' micro-batches.

        From any thread, one at a time.

        Args:
            spans: the places of the gradient in the index space, in order.
            flags: int64 scalar, which gets NONFINITE and OUT_OF_RANGE.
            first: whether it is the first of the step.
        """
        parts = [self.part(span.start, span.stop) for span in spans]
        pieces = gradient.split([part.numel() for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            if self.exact:
                self._operations.accumulate(part, piece, self.fraction_bits, flags, first=first)
            elif first:
                part.copy_(piece)
            else:
                part.add_(piece)

    def clear_kept(self, spans: Iterable[Span]) -> None:
        """Set kept sums to zero, which get no gradient in this step."""
        for span in spans:
            self.part(span.start, span.stop).zero_()

    def add_to(self, total: Tensor, other: Tensor) -> int:
        """Add `other` to `total`, parts of sums of one shape. Returns OUT_OF_RANGE on overflow."""
        if self.exact:
            return self._operations.add_integers(total, other)
        total.add_(other)
        return 0

    def read(self, sums: Tensor, gradient: Tensor) -> float:
        """Write complete sums to `gradient` as floats.

        Args:
            sums: of the dtype of `self.sums`, flat and contiguous.
            gradient: float32 or float64 of the same length, contiguous.
        Returns:
            The sum of squares, in float64.
        """
        if self.exact:
            return self._operations.convert(sums, gradient, self.fraction_bits)
        gradient.copy_(sums)
        return self._operations.sum_squares(gradient)

    def _add_exact(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        with self._noted(parameter):
            sums, first = self._views[parameter], self._is_first(parameter)
            bits, flags = self.fraction_bits, self._flags
            self._operations.accumulate(sums, gradient, bits, flags, first=first)


def _take_ordinary_gradient(
    accumulator: weakref.ref[GradientAccumulator], parameter: Tensor
) -> None:
    """Add a gradient that autograd has accumulated, where anything still sums gradients."""
    assert isinstance(parameter, nn.Parameter)
    gradient, parameter.grad = parameter.grad, None  # nothing is left if a keeper is gone
    here = accumulator()
    if here is not None and gradient is not None:
        here.add(parameter, gradient)
