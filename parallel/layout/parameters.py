"""The parameter table, read by gradient reduction, clipping, sharding and saving.

A local parameter (one tensor of a rank's module) is made of one or more *segments*: whole-row
ranges that each hold a box of one logical tensor, under its Hugging Face name. Every rule about a
parameter is in its row here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from holdfast.parallel.layout.boxes import Box


@dataclass(frozen=True, slots=True)
class Initial:
    """The initial values of a parameter: independent normal draws, or a constant."""

    kind: Literal["normal", "constant"]
    value: float
    """The standard deviation for "normal", or the constant."""


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The heads whose queries or keys a tensor makes, and how far each of its rows is scaled down
    when the logits of a head are too large (QK-clip; Kimi Team 2025, "Kimi K2", section 2.1)."""

    layer: int
    """The layer of the plan."""
    powers: tuple[tuple[int, float], ...]
    """Of the rows of a head: numbers of rows one after another, each with the power of the head's
    factor by which these are multiplied."""
    first: int = 0
    """The first row of the first head, in the logical tensor."""
    dim: int = 0
    """The dimension of the logical tensor in which these are its rows."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One segment of a local parameter: its part of a logical tensor, and its rules.

    It has a field for each rule, so that none is elsewhere.
    """

    name: str
    """The logical name, e.g. `model.layers.3.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """The shape of the whole logical tensor."""
    box: Box
    """The box of the logical tensor that this segment holds."""
    local: str
    """The local parameter's name inside its layer's module, e.g. `attention.qkv.weight`."""
    local_row: int
    """The segment's first row in dim 0 of the local parameter."""
    initial: Initial
    decay: bool
    """Whether weight decay applies."""
    copies: tuple[int, ...]
    """The parts that have the same box, ascending; a single one if every part differs."""
    summed: tuple[int, ...] = ()
    """The copies that see a part of the gradient each, so that all of their sums are added; empty
    if each copy sees all of it, and that of the first one counts."""
    whole: Box | None = None
    """The box of the logical tensor that the optimizer updates as one, which other parts may have
    some of: the rows here are one block. None: its rows are updated apart."""
    tied_use: int = 0
    """0 for a tensor's first use; 1 for the second use of a tied weight, in another layer."""
    expert: int | None = None
    """The expert of the layer that it is a matrix of; None: it is none's."""
    balance: float | None = None
    """Of biases that even loads: what a step changes each by, up where the load, to which its
    gradient is proportional, is below the mean, and down where it is above. None: the optimizer
    updates it."""
    heads: HeadRows | None = None
    """The heads whose queries or keys it makes, if QK-clip scales any of them; None: it does not.
    """

    @property
    def rows(self) -> int:
        return self.box.shape[0]

    @property
    def row_elements(self) -> int:
        return prod(self.box.shape[1:])

    @property
    def elements(self) -> int:
        return self.box.elements

    def updated_together(self, elements: int) -> int:
        """The elements of what is updated as one with a block of so many of this row's elements."""
        return elements if self.whole is None else self.whole.elements

    def is_first(self, part: int) -> bool:
        """Whether a part's segment is the one that counts: once for all copies and uses."""
        return self.tied_use == 0 and part == self.copies[0]


class HeldRow(NamedTuple):
    """A row of the parameter tables that a rank holds."""

    layer: int
    part: int
    """The part of the parameters that it is of; the rank's first one that has these elements."""
    index: int
    """The position in the table of the layer and part."""
    spec: ParameterSpec


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of the model as the plan sees it: its parameters and costs.

    Stages are cut between layers: the embedding, each transformer layer, the head.
    """

    name: str
    """The layer's name, e.g. `embedding`, `block.3`, `head`."""
    parameters: tuple[tuple[ParameterSpec, ...], ...]
    """The segments by part of the parameters; equal structure in every part."""
    forward_flops: float
    """Floating-point operations of one micro-batch's forward pass, repeated ones counted once."""
    activation_bytes: int
    """Bytes kept for one micro-batch's backward pass on one shard."""
    output_bytes: int
    """Bytes of the layer's output for one micro-batch on one shard (what a stage sends)."""
    recompute: str = "none"
    """The part that is recomputed in the backward pass, in the model's own words."""
    recompute_flops: float = 0.0
    """Operations of that recomputation for one micro-batch, counted likewise."""
    attention_flops: float = 0.0
    """Those of `forward_flops` that grow with a token's place: of queries with the keys before."""
    keys_bytes: int = 0
    """Bytes of one micro-batch's keys and values and the sums of their gradients on one shard, at
    most: what the layer keeps between stretches."""
    forward_only: bool = False
    """Whether the backward pass does not use the values of the layer's parameters."""
    vocab_chunk: int = 0
    """The head: the vocabulary entries of a part whose logits are in memory at once; 0: all."""


def expert_count(layer: LayerSpec) -> int:
    """The number of experts of a layer; 0: it has none. Pure."""
    numbers = (spec.expert for part in layer.parameters for spec in part)
    return max((number + 1 for number in numbers if number is not None), default=0)


def contributing_parts(row: HeldRow, parts: Sequence[int]) -> tuple[int, ...]:
    """The parts of a rank that give a row a gradient each: its own, or all that share it. Pure.

    Args:
        parts: the rank's.
    """
    summed = row.spec.summed
    return tuple(part for part in parts if part in summed) if summed else (row.part,)


def held_rows(
    layer: LayerSpec,
    number: int,
    parts: Sequence[int],
    experts: Collection[int] | None = None,
) -> list[HeldRow]:
    """The rows of a layer that a rank with some parts holds, by part. Pure.

    A row that several of its parts have is there once.

    Args:
        number: the layer's index.
        parts: ascending.
        experts: the experts that the rank has; None: those of its parts.
    """
    own = {part: parts[:place] for place, part in enumerate(parts)}
    return [
        HeldRow(number, part, index, spec)
        for part in (parts if experts is None else range(len(layer.parameters)))
        for index, spec in enumerate(layer.parameters[part])
        if (
            spec.expert in experts
            if experts is not None and spec.expert is not None
            else part in own and (len(spec.copies) == 1 or set(spec.copies).isdisjoint(own[part]))
        )
    ]
