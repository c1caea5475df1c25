"""The ballot: a rank's part in the vote of a step, a float64 tensor that is summed over all ranks.

The tensor has each block's square sum in its slot, the loss sum of each slice of each micro-batch
in its slot, and one count per entry of `MARKS`; in steps whose norms are noted (log.norms_every)
then the square sums of the blocks' parameters, and the sizes of layers' outputs (notes.py); in
steps whose digests are written (log.digests_every) the words of sums of bits; in steps that compare
the times of ranks (elastic.straggler_every) a row of numbers for each. One rank fills a slot
and all others have zero there, or all have whole numbers, so sums are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from holdfast.parallel.layout import Slices
from holdfast.parallel.optimizer import NONFINITE, OUT_OF_RANGE, norm_from_squares
from holdfast.parallel.pipeline import Passage
from holdfast.trainer.step.vote.notes import Loads, sizes
from holdfast.trainer.step.vote.progress import Outcome, Requests
from holdfast.trainer.step.vote.slowness import TIMES

Losses = Mapping[Passage, Tensor]
"""The loss sums of what has passed the last chunk: float64[own slices], or a scalar for the only
one; of several losses those of a slice one after another."""
SliceLosses = dict[tuple[int, int], Tensor]
"""(micro-batch, slice) -> the sum of its token losses, and those of further tokens:
float64[losses]."""
FLAGS: Mapping[str, int] = {"nonfinite": NONFINITE, "out_of_range": OUT_OF_RANGE}
"""The bits of a reduction's flags, by mark."""
REQUESTS = ("save", "stop", "interrupt", "busy", "change", "filling", "leave", "rewind")
"""The fields of `Requests`, each of which is a mark."""
MARKS = (*FLAGS, *REQUESTS)
"""The order of the counts at the end of the tensor: the wire format of the vote."""
_WORDS = 4
"""The words of 16 bits in which a sum modulo 2**64 is told: of as many as 2**37 ranks, their sums
are exact in float64."""


@dataclass(frozen=True, slots=True)
class BallotFormat:
    """The lengths of the parts of the tensor, equal on all ranks."""

    squares: int
    """The number of blocks, over all shard indices."""
    losses: int
    """The number of micro-batches of a step, times the slices of a sequence, times the losses of
    each."""
    layers: tuple[int, ...] = ()
    """The layer of each block, in a step whose norms are noted; else empty."""
    experts: tuple[int, int] = (0, 0)
    """The layers of the model, and the experts of each."""
    outputs: tuple[int, int] = (0, 0)
    """In a step whose norms are noted, the layers with outputs, and the numbers of each."""
    kinds: int = 1
    """The losses of each slice."""
    digested: int = 0
    """In a step whose digests are written, the layers of the model."""
    timed: int = 0
    """In a step that compares the times of ranks, the number of ranks."""

    def pack(
        self,
        squares: Tensor,
        losses: Tensor,
        flags: int,
        requests: Requests,
        parameters: Tensor | None = None,
        loads: Loads | None = None,
        outputs: Tensor | None = None,
        bit_sums: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """This rank's tensor: float64[squares + losses + len(MARKS)], `squares` and `outputs` more
        for norms, `bit_sums` for digests, `times`, and one for each expert of each layer.

        Args:
            squares: float64[squares], zero but for blocks that this rank owns.
            parameters: the same of parameters, in a step whose norms are noted.
            losses: float64[losses], zero but for those that this rank reports.
            flags: NONFINITE | OUT_OF_RANGE as seen by this rank.
            loads: those that this rank reports.
            outputs: float64[outputs], in a step whose norms are noted.
            bit_sums: `words_of` this rank's, in a step whose digests are written.
            times: float64[timed, TIMES], zero but for this rank's row, in a step that compares.
        """
        marks = {name: bool(flags & bit) for name, bit in FLAGS.items()}
        marks |= {name: getattr(requests, name) for name in REQUESTS}
        counts = torch.tensor([marks[name] for name in MARKS], dtype=torch.float64)
        of_experts = torch.zeros(self.experts, dtype=torch.float64)
        for key, load in (loads or {}).items():
            of_experts[key.layer] += load.to(of_experts)
        further = (parameters, outputs, bit_sums, times)
        norms = [noted.flatten() for noted in further if noted is not None]
        return torch.cat([squares, losses, counts, *norms, of_experts.flatten()])

    def times(self, summed: Tensor) -> list[list[float]]:
        """The times of all ranks in the sum of all tensors: `timed` rows of `TIMES` numbers."""
        stop = len(summed) - prod(self.experts)
        return summed[stop - self.timed * TIMES : stop].view(self.timed, TIMES).tolist()

    def outcome(self, summed: Tensor, tokens: int) -> Outcome:
        """The outcome of the sum of all ranks' tensors; equal on all ranks, bit for bit.

        Args:
            tokens: those that the step predicts, by which the sum of the losses is divided.
        """
        values = summed.tolist()
        squares, rest = values[: self.squares], values[self.squares :]
        counts = {name: int(rest[self.losses + place]) for place, name in enumerate(MARKS)}
        asked = self.squares if self.layers else 0
        parameters = rest[self.losses + len(MARKS) :][:asked]
        noted = self.squares + self.losses + len(MARKS) + asked
        outputs = summed[noted : noted + prod(self.outputs)].view(self.outputs)
        words = rest[noted - self.squares + prod(self.outputs) :][: 2 * _WORDS * self.digested]
        means = [
            mean_loss(rest[kind : self.losses : self.kinds], tokens) for kind in range(self.kinds)
        ]
        loads = summed[len(values) - prod(self.experts) :].view(self.experts).long()
        finite = bool(torch.isfinite(summed[: self.squares]).all()) and not counts["nonfinite"]
        return Outcome(
            loss=means[0],
            grad_norm=norm_from_squares(squares) if finite else float("nan"),
            nonfinite_ranks=counts["nonfinite"],
            out_of_range_ranks=counts["out_of_range"],
            requests=Requests(**{name: counts[name] > 0 for name in REQUESTS}),
            leaving_ranks=counts["leave"],
            layer_norms=layer_norms(squares, parameters, self.layers) if finite else (),
            layer_outputs=sizes(outputs),
            loads=tuple(map(tuple, loads.tolist())) if self.experts[1] else (),
            further_losses=tuple(means[1:]) if finite else (),
            bit_sums=tuple(zip(*sums_of(words, self.digested), strict=True)),
        )


def words_of(gradients: Sequence[int], parameters: Sequence[int]) -> Tensor:
    """Sums modulo 2**64 of each layer in words that can be added in floats. Pure.

    Returns:
        float64[2 * 4 * layers]: those of gradients, then those of parameters, 16 bits each.
    """
    numbers = [*gradients, *parameters]
    words = [[number >> 16 * place & 0xFFFF for place in range(_WORDS)] for number in numbers]
    return torch.tensor(words, dtype=torch.float64).flatten()


def sums_of(words: Sequence[float], layers: int) -> tuple[list[int], list[int]]:
    """The sums modulo 2**64 of gradients and parameters by layer, from added words. Pure."""
    numbers = [
        sum(int(word) << 16 * place for place, word in enumerate(words[first : first + _WORDS]))
        % 2**64
        for first in range(0, len(words), _WORDS)
    ]
    return numbers[:layers], numbers[layers:]


def layer_norms(
    gradients: Sequence[float], parameters: Sequence[float], layers: Sequence[int]
) -> tuple[tuple[float, float], ...]:
    """The norms of each layer's gradients and parameters. Pure.

    Args:
        gradients, parameters: the sum of squares of each block.
        layers: the layer of each block; empty: no norms are asked for.
    """
    count = max(layers, default=-1) + 1
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in range(count)]
    for layer, *squares in zip(layers, gradients, parameters, strict=bool(layers)):
        for own, square in zip(found[layer], squares, strict=True):
            own.append(square)
    return tuple((norm_from_squares(g), norm_from_squares(p)) for g, p in found)


def by_slice(losses: Losses, slices: Slices, stretches: int = 1) -> SliceLosses:
    """The loss sums of a rank, one by one. Pure.

    Args:
        stretches: the parts in which a sequence passes a chunk.
    """
    found: SliceLosses = {}
    for (micro_batch, stretch), loss in losses.items():
        own = (slices if stretch is None else slices.stretch(stretch, stretches)).own
        of_slices = zip(own, loss.view(len(own), -1), strict=True)
        found |= {(micro_batch, number): value for number, value in of_slices}
    return found


def loss_slots(losses: SliceLosses, micro_batches: int, slices: int, kinds: int = 1) -> Tensor:
    """Loss sums in their slots: float64[micro_batches * slices * kinds], zero elsewhere. Pure.

    Args:
        slices: the slices of a sequence.
        kinds: the losses of each.
    """
    slots = torch.zeros(micro_batches, slices, kinds, dtype=torch.float64)
    for place, loss in losses.items():
        slots[place] = loss.to(slots)
    return slots.view(-1)


def mean_loss(sums: Sequence[float], tokens: int) -> float:
    """Loss sums, added in the order of micro-batches and slices in float64, and divided once."""
    total = 0.0
    for value in sums:
        total += value
    return total / tokens
