"""The protocols between the executor, the gradient accumulator and a model family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from holdfast.parallel.layout import ParameterSpec


@dataclass(frozen=True, slots=True)
class MicroBatchContext:
    """The properties of the micro-batch that a chunk computes."""

    step: int
    micro_batch: int
    """The step's global number, whatever rank computes it."""
    training: bool
    tokens: Tensor | None
    """int64[micro_batch, seq_len + 1]; None except for the first and the last chunk."""


class GradientSink(Protocol):
    """The place where micro-batch gradients are summed."""

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient of the whole local parameter."""
        ...

    def add_matmul(
        self, parameter: nn.Parameter, grad_output: Iterable[Tensor], value: Tensor
    ) -> None:
        """Add grad_output[tokens, out].T @ value[tokens, in].

        Args:
            grad_output: blocks of its columns, from the first to the last.
        """
        ...

    def add_rows(self, parameter: nn.Parameter, rows: Tensor, gradient: Tensor) -> None:
        """Add gradient[k, ...] to the distinct rows int64[k]."""
        ...


class WeightGradientRecord(NamedTuple):
    """A linear layer's weight gradient that is still to be computed."""

    parameter: nn.Parameter
    grad_output: Iterable[Tensor]
    """float[tokens, out], as blocks of columns."""
    value: Tensor
    """float[tokens, in]"""


class WeightGradientQueue:
    """The weight gradients of one chunk's linear layers: computed at once, or kept for later.

    Keeping them splits a backward pass into its input and weight parts (zero-bubble schedules, Qi
    et al. 2023). Without a sink, layers return weight gradients to autograd.
    """

    def __init__(self) -> None:
        self._sink: GradientSink | None = None
        self._kept: list[WeightGradientRecord] | None = None

    @property
    def sink(self) -> GradientSink | None:
        """The sink that sums the gradients."""
        return self._sink

    def subscribe(self, sink: GradientSink) -> None:
        """Hand all gradients to `sink` from now on: it exists only once the parameters do."""
        self._sink = sink

    @contextmanager
    def deferred(self) -> Iterator[list[WeightGradientRecord]]:
        """Keep gradients put during the block in the yielded list; `run` computes them later."""
        kept: list[WeightGradientRecord] = []
        self._kept = kept
        try:
            yield kept
        finally:
            self._kept = None

    @property
    def defers(self) -> bool:
        """Whether gradients that are put now are computed later."""
        return self._kept is not None

    def put(self, parameter: nn.Parameter, grad_output: Iterable[Tensor], value: Tensor) -> None:
        """Add one weight gradient: blocks of columns of float[tokens, out], float[tokens, in].

        A sink that does not need the gradient does not iterate over the blocks.
        """
        record = WeightGradientRecord(parameter, grad_output, value.detach())
        if self._kept is None:
            self.run((record,))
        else:
            self._kept.append(record)

    def run(self, records: Sequence[WeightGradientRecord]) -> None:
        """Compute and add the gradients of `records`, in order."""
        assert self._sink is not None
        for record in records:
            self._sink.add_matmul(*record)


class Chunk(nn.Module):
    """A contiguous part of a model that runs on one rank.

    `forward(hidden, context)`: `hidden` is None for the first chunk, which embeds the context's
    tokens. The last chunk returns the sum of its token losses, a float64 scalar. The others return
    float[seq (/ tensor), micro_batch, hidden].
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue = WeightGradientQueue()

    def named_specs(self) -> list[tuple[int, ParameterSpec, nn.Parameter]]:
        """(layer index, table row, parameter) of each parameter, in layer then table order."""
        raise NotImplementedError

    def modules_by_layer(self) -> list[tuple[int, nn.Module]]:
        """Each layer's index and module, in forward order."""
        raise NotImplementedError
