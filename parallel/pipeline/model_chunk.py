"""The protocols between the executor, the gradient accumulator and a model family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from holdfast.parallel.layout import GradientMark, HeldRow, Slices
from holdfast.parallel.pipeline.batch import Batch
from holdfast.parallel.pipeline.expert_team import ExpertTeam


class Passage(NamedTuple):
    """What passes a chunk at once."""

    micro_batch: int
    """The step's global number, whatever rank computes it."""
    stretch: int | None = None
    """Which of the equal parts of its sequences; None: all of them."""


class TokensKey(NamedTuple):
    """Some tokens at a layer, of which it notes something by themselves."""

    layer: int
    part: int
    """The part of the parameters that has the tokens."""
    micro_batch: int
    number: int
    """The slice."""


@dataclass(frozen=True, slots=True)
class MicroBatchContext:
    """The properties of the micro-batch that a chunk computes, or of a stretch of it."""

    step: int
    micro_batch: int
    """The step's global number, whatever rank computes it."""
    training: bool
    batch: Batch | None
    """Its tokens and documents; None where no chunk of the rank reads them."""
    loss_gradient: float = 1.0
    """The derivative of the step's loss by a token's loss: 1 / the tokens that a step predicts."""
    z_loss: float = 0.0
    """The factor of the z-loss of the head; see `cross_entropy_sum`."""
    slices: Slices = field(default_factory=Slices)
    """The slices of its sequences, of which the pass computes this rank's own."""
    kept: dict[object, Any] = field(default_factory=dict)
    """What a module keeps for other stretches of the micro-batch, by itself."""
    watch: Callable[[int, Sequence[Tensor], MicroBatchContext], None] | None = None
    """Called with each layer but the last, its hidden states of the own slices, and this."""
    loads: dict[TokensKey, Tensor] = field(default_factory=dict)
    """What routers note in training: the choices of each expert, int64[experts]."""
    logits: dict[TokensKey, Tensor] | None = None
    """What attention notes if it is asked: the largest logit of each query head of the part, of the
    slice's queries: float64[heads]."""
    experts: ExpertTeam | None = None
    """The ranks that have the experts of the tokens; None: those of the tensor group, by part."""

    @property
    def hosts_only(self) -> bool:
        """Whether this rank has no tokens here: its experts take those of others meanwhile."""
        return self.micro_batch < 0


class GradientSink(Protocol):
    """The place where micro-batch gradients are summed, each slice's by itself.

    A gradient has a number in its micro-batch: that of its slice. Of a parameter that gets several
    of each slice, p, the one at place k of slice q has q times p + k. It is of the micro-batch that
    the sink was told, unless it says of which: experts compute other ranks' micro-batches.
    """

    def add(self, parameter: nn.Parameter, gradient: Tensor, unit: int = 0) -> None:
        """Add a gradient of the whole local parameter, with the number `unit`."""
        ...

    def add_matmul(
        self,
        parameter: nn.Parameter,
        grad_output: Iterable[Tensor],
        value: Tensor,
        marks: Sequence[GradientMark],
    ) -> None:
        """Add grad_output[tokens, out].T @ value[tokens, in], the sum of several gradients.

        Args:
            grad_output: blocks of its columns, from the first to the last.
            marks: those of its gradients, which have the tokens one after another.
        """
        ...

    def add_rows(
        self, parameter: nn.Parameter, rows: Tensor, gradient: Tensor, unit: int = 0
    ) -> None:
        """Add gradient[k, ...] to the distinct rows int64[k]."""
        ...

    def pass_over(self, parameter: nn.Parameter, count: int) -> None:
        """Expect so many gradients less: other ranks have them."""
        ...


class WeightGradientRecord(NamedTuple):
    """A linear layer's weight gradient that is still to be computed."""

    parameter: nn.Parameter
    grad_output: Iterable[Tensor]
    """float[tokens, out], as blocks of columns."""
    value: Tensor
    """float[tokens, in]"""
    marks: Sequence[GradientMark]


@dataclass(slots=True)
class _Destination:
    """Where the gradients of a chunk go."""

    sink: GradientSink | None = None
    kept: list[WeightGradientRecord] | None = None

    def subscribe(self, sink: GradientSink) -> None:
        self.sink = sink

    def keep(self, kept: list[WeightGradientRecord] | None) -> None:
        self.kept = kept


class WeightGradientQueue:
    """The weight gradients of one chunk's linear layers: computed at once, or kept for later.

    Keeping them splits a backward pass into its input and weight parts (zero-bubble schedules, Qi
    et al. 2023). Without a sink, layers return weight gradients to autograd.
    """

    def __init__(self) -> None:
        self._destination = _Destination()
        self._unit = 0

    def of(self, unit: int) -> WeightGradientQueue:
        """The same queue, for gradients with the number `unit` in their micro-batch."""
        if unit == self._unit:
            return self
        queue = WeightGradientQueue()
        queue._destination, queue._unit = self._destination, unit
        return queue

    @property
    def has_sink(self) -> bool:
        """Whether gradients are summed by a sink, and not by autograd."""
        return self._destination.sink is not None

    def subscribe(self, sink: GradientSink) -> None:
        """Hand all gradients to `sink` from now on: it exists only once the parameters do."""
        self._destination.subscribe(sink)

    @contextmanager
    def deferred(self) -> Iterator[list[WeightGradientRecord]]:
        """Keep gradients put during the block in the yielded list; `run` computes them later."""
        kept: list[WeightGradientRecord] = []
        self._destination.keep(kept)
        try:
            yield kept
        finally:
            self._destination.keep(None)

    @property
    def defers(self) -> bool:
        """Whether gradients that are put now are computed later."""
        return self._destination.kept is not None

    def put(
        self,
        parameter: nn.Parameter,
        grad_output: Iterable[Tensor],
        value: Tensor,
        marks: Sequence[GradientMark] = (),
    ) -> None:
        """Add weight gradients: blocks of columns of float[tokens, out], float[tokens, in].

        A sink that does not need the gradient does not iterate over the blocks.

        Args:
            marks: those of the gradients; empty: it is one, of this queue's number.
        """
        marks = marks or (GradientMark(len(value), self._unit),)
        record = WeightGradientRecord(parameter, grad_output, value.detach(), marks)
        kept = self._destination.kept
        if kept is None:
            self.run((record,))
        else:
            kept.append(record)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient of the whole local parameter, at once. There is a sink."""
        self._sink.add(parameter, gradient, self._unit)

    def add_rows(self, parameter: nn.Parameter, rows: Tensor, gradient: Tensor) -> None:
        """Add gradient[k, ...] to the distinct rows int64[k], at once. There is a sink."""
        self._sink.add_rows(parameter, rows, gradient, self._unit)

    def pass_over(self, parameter: nn.Parameter, count: int) -> None:
        """Expect so many gradients less, because other ranks have them. There is a sink."""
        self._sink.pass_over(parameter, count)

    def run(self, records: Sequence[WeightGradientRecord]) -> None:
        """Compute and add the gradients of `records`, in order."""
        for record in records:
            self._sink.add_matmul(*record)

    @property
    def _sink(self) -> GradientSink:
        assert self._destination.sink is not None
        return self._destination.sink


class Chunk(nn.Module):
    """A contiguous part of a model that runs on one rank.

    `forward(hidden, context)`: `hidden` is None for the first chunk, which embeds the batch's
    tokens. The last chunk returns the sum of its token losses, a float64 scalar; if sequences have
    several slices, float64[own slices]; with losses of further tokens, several for each slice. The
    others return float[seq (/ tensor), micro_batch, hidden], with the tokens of the own slices one
    after the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue = WeightGradientQueue()

    def host(self, root: Tensor, context: MicroBatchContext) -> Tensor:
        """Have the experts here take part in the passage of other ranks' micro-batches.

        Collective over the team of `context`, whose other members compute a passage.

        Args:
            root: float[0, hidden]: the beginning of the graph.
        Returns:
            float[0, hidden]: the end of the graph, for the backward passage.
        """
        raise NotImplementedError

    def no_tokens(self) -> Tensor:
        """The hidden state of no token: float[0, hidden]."""
        raise NotImplementedError

    def rows(self) -> list[tuple[HeldRow, nn.Parameter]]:
        """The rows of the chunk, by layer and part in the order of the tables; the parameters."""
        raise NotImplementedError

    def modules_by_layer(self) -> list[tuple[int, nn.Module]]:
        """Each layer's index and module, in forward order."""
        raise NotImplementedError
