"""The share of each rank of a shard group in the parameters of a layer.

Every rank computes the shares of all ranks of its group alike, so that messages need no
description. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from holdfast.parallel.optimizer.exchange import placed_blocks, span_of
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer, Segment
from holdfast.parallel.optimizer.spans import KeptSpans, Span, joined
from holdfast.parallel.plan import KeptKind, Plan, is_apart, keepers, shard_group


@dataclass(frozen=True, slots=True)
class LayerShares:
    """The shared parameters of one layer on one rank, and what each rank of its group keeps."""

    layer: int
    parameters: tuple[nn.Parameter, ...]
    place: Span
    """The part of the flat index space that the layer's parameters have."""
    shares: Mapping[int, tuple[Span, ...]]
    """Keeper -> its blocks, as joined places in the flat index space, ascending."""
    whole: tuple[Span, ...] = ()
    """What is not shared, of these parameters. Of gradients: the rows that other parts have too,
    beside shared rows; each rank keeps the sums of its own. Of parameters: the rank's experts."""

    def taken(self, keeper: int, sender: int) -> tuple[Span, ...]:
        """What a keeper adds of a sender's gradients to its sums."""
        spans = self.shares.get(keeper, ())
        return (*spans, *self.whole) if keeper == sender else spans

    def elements(self, keeper: int) -> int:
        """The number of elements that a rank keeps."""
        return sum(span.elements for span in self.shares.get(keeper, ()))


def kept_spans(plan: Plan, rank: int, kept: KeptKind) -> Callable[[Sequence[Segment]], KeptSpans]:
    """What a rank keeps of its segments, as `ParameterBuffer` asks for it."""

    def find(segments: Sequence[Segment]) -> KeptSpans:
        spans = [
            span_of(block, segment)
            for segment, block in placed_blocks(plan, segments)
            if rank in keepers(plan, block, kept, segment.layer) or is_apart(plan, block, kept)
        ]
        return KeptSpans(sorted(spans, key=lambda span: span.start))

    return find


def layer_shares(
    plan: Plan, rank: int, buffer: ParameterBuffer, kept: KeptKind
) -> dict[int, LayerShares]:
    """The shares of each layer of a rank, by layer. Pure.

    Parameters whose sums every rank keeps whole have no share in gradients.
    """
    members = frozenset(shard_group(plan, rank, kept).ranks)
    spans: dict[int, dict[int, list[Span]]] = {}
    parameters: dict[int, dict[nn.Parameter, None]] = {}
    whole: dict[nn.Parameter, list[Span]] = {}
    for segment, block in placed_blocks(plan, buffer.segments):
        if is_apart(plan, block, kept):
            whole.setdefault(segment.parameter, []).append(span_of(block, segment))
            if kept == "parameters":
                parameters.setdefault(segment.layer, {})[segment.parameter] = None
            continue
        (keeper,) = members.intersection(keepers(plan, block, kept, segment.layer))
        of_layer = spans.setdefault(segment.layer, {})
        of_layer.setdefault(keeper, []).append(span_of(block, segment))
        parameters.setdefault(segment.layer, {})[segment.parameter] = None
    return {
        layer: LayerShares(
            layer,
            tuple(found),
            _place(buffer, found),
            {k: _ascending(places) for k, places in sorted(spans.get(layer, {}).items())},
            _ascending(span for parameter in found for span in whole.get(parameter, ())),
        )
        for layer, found in parameters.items()
    }


def _ascending(spans: Iterable[Span]) -> tuple[Span, ...]:
    return joined(sorted(spans, key=lambda span: span.start))


def _place(buffer: ParameterBuffer, parameters: Collection[nn.Parameter]) -> Span:
    places = [buffer.place(parameter) for parameter in parameters]
    return Span(min(start for start, _ in places), max(stop for _, stop in places))
