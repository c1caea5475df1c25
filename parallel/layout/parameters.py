"""The table of parameters, whose rows gradient synchronisation, clipping, sharding and saving read.

A local parameter (one tensor of a rank's module) is made of one or more *segments*: whole-row
ranges that each hold a box of one logical tensor, named as Hugging Face names it. Nothing about a
parameter is decided anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from holdfast.parallel.layout.boxes import Box


@dataclass(frozen=True, slots=True)
class Initial:
    """How a parameter starts: independent normal draws, or a constant."""

    kind: Literal["normal", "constant"]
    value: float
    """Standard deviation for "normal", the constant for "constant"."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One segment of a local parameter: which part of which logical tensor it is, and its rules."""

    name: str
    """Logical name, e.g. `model.layers.3.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    box: Box
    """The part of the logical tensor that this segment holds."""
    local: str
    """Name of the local parameter inside its layer's module, e.g. `attention.qkv.weight`."""
    local_row: int
    """First row of the segment in the local parameter's dimension 0."""
    initial: Initial
    decay: bool
    """Whether weight decay applies."""
    copies: tuple[int, ...]
    """Shard indices that hold the same box, ascending; one entry when every shard has another."""
    summed: tuple[int, ...] = ()
    """The copies that see a part of the gradient each, so that their sums are added; empty where
    each copy sees all of it."""
    tied_use: int = 0
    """0 for a tensor's first use; 1 for the second use of a tied weight, in another layer."""

    @property
    def rows(self) -> int:
        return self.box.shape[0]

    @property
    def row_elements(self) -> int:
        return prod(self.box.shape[1:])

    @property
    def elements(self) -> int:
        return self.rows * self.row_elements

    def counts_in_norm(self, shard_index: int) -> bool:
        """Whether this copy is the one that enters the global gradient norm."""
        return self.tied_use == 0 and shard_index == self.copies[0]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of the model as the plan sees it: its parameters and what it costs.

    Stages are cut between layers: the embedding, each transformer layer, the head.
    """

    name: str
    """E.g. `embedding`, `block.3`, `head`."""
    parameters: tuple[tuple[ParameterSpec, ...], ...]
    """By shard index; equal structure at every index."""
    forward_flops: float
    """Floating-point operations of one micro-batch's forward pass, repeated ones counted once."""
    activation_bytes: int
    """Bytes kept for one micro-batch's backward pass on one shard."""
    output_bytes: int
    """Bytes of the layer's output for one micro-batch on one shard (what a stage sends)."""
    recompute: str = "none"
    """What of it is computed again in the backward pass, in the model's own words."""
    recompute_flops: float = 0.0
    """Operations of that, of one micro-batch, counted likewise."""
