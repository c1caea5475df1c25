"""What layers note of tokens in a step: the loads of experts, the sizes of their outputs, and the
largest logits of attention.

Of a layer's output a rank adds up the squares of each part's tokens of each slice by themselves, in
an order that no layout changes, and notes the largest absolute value. Sums of several such numbers
are exact: integers of so many bits that no sum of float64 is rounded. Exact-mode safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.parallel.optimizer import operations_of
from holdfast.parallel.pipeline import MicroBatchContext, TokensKey
from holdfast.parallel.plan import Plan

_LOWEST = 1074
"""The least positive float64 is 2 to the power of minus this."""
_LIMB_BITS = 32
"""The bits of a whole number in a float64 of the vote: those of 2^21 ranks can be added."""
_LIMBS = (_LOWEST + 1024 + 64) // _LIMB_BITS + 1
"""Those of a sum of squares: of 2^64 of the largest."""
OutputSize = tuple[float, float]
"""The root mean square of a layer's output, and the largest absolute value."""


class TokensOutput(NamedTuple):
    """A layer's output for some tokens."""

    squares: float
    """The sum of squares."""
    largest: float
    """The largest absolute value; infinite if some value is not finite."""
    elements: int


Loads = dict[TokensKey, Tensor]
"""The choices of each expert of a layer, of a part of the tokens of a slice: int64[experts]."""
Outputs = dict[TokensKey, TokensOutput]
"""By layer and tokens."""
Logits = dict[TokensKey, Tensor]
"""The largest logit of each head of a part, of a slice's queries: float64[heads]."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What the layers of one rank note in a step. Local."""

    parts: Sequence[int] = ()
    """The parts whose tokens' outputs are noted, in the order in which the rank has them."""
    loads: Loads = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)
    logits: Logits = field(default_factory=dict)

    def watch(self, layer: int, values: Sequence[Tensor], context: MicroBatchContext) -> None:
        """Note a layer's hidden states of each own slice."""
        for number, value in zip(context.slices.own, values, strict=True):
            of_parts = value.detach().chunk(len(self.parts))
            for part, tokens in zip(self.parts, of_parts, strict=True):
                key = TokensKey(layer, part, context.micro_batch, number)
                self.outputs[key] = output_of(tokens)

    def and_of(self, other: Notes) -> Notes:
        """These notes and others', which take precedence. Pure."""
        return Notes(
            self.parts,
            self.loads | other.loads,
            self.outputs | other.outputs,
            self.logits | other.logits,
        )

    def only(self, keeps: Callable[[TokensKey], bool]) -> Notes:
        """The notes of some tokens. Pure."""
        loads = {key: load for key, load in self.loads.items() if keeps(key)}
        outputs = {key: output for key, output in self.outputs.items() if keeps(key)}
        logits = {key: largest for key, largest in self.logits.items() if keeps(key)}
        return Notes(self.parts, loads, outputs, logits)


def output_of(hidden: Tensor) -> TokensOutput:
    """The size of a hidden state, of any shape and float dtype. Local; waits for the device."""
    values = hidden.contiguous()
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    squares = operations_of(values.device).sum_squares(values.view(-1))
    if not math.isfinite(squares):
        return TokensOutput(0.0, math.inf, values.numel())
    return TokensOutput(squares, float(values.abs().max()), values.numel())


def largest_of(logits: Logits, layers: int, heads: int) -> Tensor:
    """The largest logit of each head of each layer in a rank's notes: float64[layers, heads].

    It is minus infinity where the rank has none. Local; waits for the device.

    Args:
        layers, heads: those of the model.
    """
    found = torch.full((layers, heads), -torch.inf, dtype=torch.float64)
    for key, largest in logits.items():
        here = found[key.layer, key.part * len(largest) :][: len(largest)]
        torch.maximum(here, largest.to(here), out=here)
    return found


def by_layer(largest: Tensor) -> tuple[tuple[float, ...], ...]:
    """The largest logits of heads by layer, as of `Outcome.logits`. Pure.

    Args:
        largest: as of `largest_of`, of all ranks.
    """
    layers = [row if max(row) > -math.inf else [] for row in largest.tolist()]
    finite = all(math.isfinite(value) for row in layers for value in row)
    return tuple(map(tuple, layers)) if finite else ()


def place_of(plan: Plan, rank: int) -> tuple[int, int]:
    """The place of a rank among those of its stage, and how many the largest stage has. Pure."""
    stages = [[rank for held in stage for rank in held] for stage in plan.stage_replicas.stages]
    at = plan.stage_replicas.find(rank)
    place = 0 if at is None else stages[at.pipeline].index(rank)
    return place, max(map(len, stages))


def packed(outputs: Outputs, layers: int, place: int, places: int) -> Tensor:
    """A rank's part in the vote, which is a sum: float64[layers, numbers].

    The numbers are those of the exact sum of squares, the number of elements, and for each rank
    that may have the layer a slot for its largest value. Pure.

    Args:
        place, places: as of `place_of`.
    """
    found = torch.zeros(layers, _LIMBS + 1 + places, dtype=torch.float64)
    for layer in range(layers):
        own = [output for key, output in outputs.items() if key.layer == layer]
        squares = sum(_integer(output.squares) for output in own)
        limbs = [squares >> _LIMB_BITS * k & (1 << _LIMB_BITS) - 1 for k in range(_LIMBS)]
        largest = [0.0] * places
        largest[place] = max((output.largest for output in own), default=0.0)
        elements = float(sum(output.elements for output in own))
        found[layer] = torch.tensor([*limbs, elements, *largest], dtype=torch.float64)
    return found


def sizes(summed: Tensor) -> tuple[OutputSize | None, ...]:
    """The size of each layer's output, from the sum of all ranks' parts; None: it is not finite.

    The mean of the squares is their exact sum over their number, rounded once. Pure.

    Args:
        summed: as `packed`.
    """
    found: list[OutputSize | None] = []
    for row in summed.tolist():
        limbs, elements, largest = row[:_LIMBS], int(row[_LIMBS]), max(row[_LIMBS + 1 :])
        squares = sum(int(limb) << _LIMB_BITS * k for k, limb in enumerate(limbs))
        is_known = elements > 0 and math.isfinite(largest)
        rms = math.sqrt(squares / (elements << _LOWEST)) if is_known else math.nan
        found.append((rms, largest) if is_known else None)
    return tuple(found)


def _integer(value: float) -> int:
    """A float64 that is 0 or more, as the multiple of the least one that it is. Pure."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << _LOWEST + 1 - denominator.bit_length()
