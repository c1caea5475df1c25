"""The gradients of experts that were lost with a rank, computed again from what they had.

The tokens' ranks send the rows again, with the gradients of what the experts made of them; the
experts' new ranks multiply. Nothing else of these micro-batches is computed. Exact-mode safe: the
products are those of the backward pass, of the same matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast.parallel.comm import Handle
from holdfast.parallel.expert_parallel.products import Work, put_weight_gradients
from holdfast.parallel.layout import GradientMark, LostGradient, SliceKey
from holdfast.parallel.pipeline import (
    Chunk,
    ExpertInput,
    ExpertInputs,
    ExpertTeam,
    WeightGradientQueue,
)


class _Expert(NamedTuple):
    """An expert of this rank."""

    matrices: tuple[nn.Parameter, nn.Parameter]
    queue: WeightGradientQueue


_Experts = Mapping[tuple[int, int | None], _Expert]
"""By layer and number."""


def add_lost_gradients(
    lost: Sequence[LostGradient], chunks: Sequence[Chunk], team: ExpertTeam
) -> None:
    """Have the gradient sums of `chunks` get what they lack. Collective over the team.

    Args:
        lost: equal on all members; by layer, then by slice.
        chunks: this rank's.
        team: what it has kept has the slices of which this rank is a source.
    Raises:
        PeerLost: a member is gone.
    """
    if not lost:
        return
    like = chunks[0].no_tokens()
    experts: _Experts = {key: found for chunk in chunks for key, found in _experts(chunk)}
    counts = _counts(lost, team, like.device)
    before: _Exchange | None = None
    start = 0
    for work in _parts(lost, team.most_slices * (1 + max(team.sources))):
        exchange = _Exchange(work, counts[:, start : (start := start + len(work))], team, like)
        if before is not None:
            before.add(experts)
        before = exchange
    if before is not None:
        before.add(experts)


def _experts(chunk: Chunk) -> Iterator[tuple[tuple[int, int | None], _Expert]]:
    """The experts of a chunk, by layer and number."""
    rows = [(row, p) for row, p in chunk.rows() if row.spec.expert is not None]
    for key, of_expert in groupby(rows, key=lambda found: (found[0].layer, found[0].spec.expert)):
        gate_up, down = dict.fromkeys(parameter for _, parameter in of_expert)
        yield key, _Expert((gate_up, down), chunk.queue)


def _parts(lost: Sequence[LostGradient], slices: int) -> Iterator[list[LostGradient]]:
    """The gradients of one layer and so many slices at once: about what a passage brings."""
    for _, of_layer in groupby(lost, key=lambda piece: piece.layer):
        found: list[LostGradient] = []
        keys: set[SliceKey] = set()
        for piece in of_layer:
            if piece.key not in keys and len(keys) == slices:
                yield found
                found, keys = [], set()
            keys.add(piece.key)
            found.append(piece)
        yield found


def _counts(lost: Sequence[LostGradient], team: ExpertTeam, device: torch.device) -> Tensor:
    """The rows of each gradient at each member: int64[members, gradients]."""
    chosen = {
        place: _inputs(team).of(*place).experts.to(device, non_blocking=True)
        for place in {(piece.layer, piece.key) for piece in lost if team.index in piece.sources}
    }
    none = torch.zeros((), dtype=torch.int64, device=device)
    here = torch.stack(
        [
            (chosen[piece.layer, piece.key] == piece.expert).sum()
            if team.index in piece.sources
            else none
            for piece in lost
        ]
    )
    found = [here]
    if team.group is not None:
        found = [torch.empty_like(here) for _ in team.sources]
        team.group.all_gather(found, here).wait()
    return torch.stack(found).cpu()


class _Exchange:
    """The rows of some gradients of a layer on their way to the experts' new ranks."""

    def __init__(
        self, work: Sequence[LostGradient], counts: Tensor, team: ExpertTeam, like: Tensor
    ) -> None:
        """Begin to send and to receive. Collective.

        Args:
            counts: int64[members, len(work)].
        """
        self._own = [place for place, piece in enumerate(work) if piece.host == team.index]
        self._work, self._sizes = work, counts[:, self._own].tolist()
        leaving: list[list[Tensor]] = [[] for _ in team.sources]
        inputs: dict[SliceKey, ExpertInput] = {}
        for piece in work:
            if team.index in piece.sources:
                if piece.key not in inputs:
                    kept = _inputs(team).of(piece.layer, piece.key)
                    inputs[piece.key] = kept.moved(like.device)
                leaving[piece.host].append(_rows(piece.expert, inputs[piece.key]))
        wide = like.new_empty(0, 2 * like.shape[1])
        sent = [torch.cat(rows) if rows else wide for rows in leaving]
        self._sent = self._arriving = sent  # what is sent stays until it has left
        self._handle: Handle | None = None
        if team.group is not None:
            self._arriving = [wide.new_empty(sum(sizes), wide.shape[1]) for sizes in self._sizes]
            self._handle = team.group.all_to_all(self._arriving, sent)

    def add(self, experts: _Experts) -> None:
        """Add the gradients to this rank's sums, once the rows are here."""
        if self._handle is not None:
            self._handle.wait()
        of_members = [
            rows.split(sizes) for rows, sizes in zip(self._arriving, self._sizes, strict=True)
        ]
        for number, place in enumerate(self._own):
            piece = self._work[place]
            rows = torch.cat([of_members[source][number] for source in piece.sources])
            value, gradient = (half.contiguous() for half in rows.chunk(2, 1))
            micro_batch, slice_ = piece.key
            mark = GradientMark(len(rows), slice_, micro_batch)
            matrices, queue = experts[piece.layer, piece.expert]
            put_weight_gradients(value, gradient, Work(piece.expert, (mark,)), matrices, queue)


def _rows(expert: int, found: ExpertInput) -> Tensor:
    """The rows of an expert, each with the gradient of what it became: float[rows, 2 hidden]."""
    tokens, choices = (found.experts == expert).nonzero(as_tuple=True)
    weights = found.weights[tokens, choices].unsqueeze(1)
    gradient = found.gradient[tokens].to(weights.dtype) * weights
    return torch.cat([found.tokens[tokens], gradient.to(found.tokens.dtype)], 1)


def _inputs(team: ExpertTeam) -> ExpertInputs:
    assert team.inputs is not None
    return team.inputs
