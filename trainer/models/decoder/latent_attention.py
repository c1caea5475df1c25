"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2) over the heads of a rank's parts.

Between its projections it is the attention of other decoders: a head's turning elements lie where
rotary tables turn, the others where these leave them as they are, and values are filled up to the
width of keys. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.pipeline import MicroBatchContext, WeightGradientQueue
from holdfast.parallel.tensor_parallel import (
    TensorParallel,
    column_linear,
    of_parts,
    row_linear,
    to_parts,
)
from holdfast.trainer.models.decoder.attention import AttentionCore, stack_of_parts
from holdfast.trainer.models.decoder.norms import Choice, Queues, RMSNorm, joined_linear
from holdfast.trainer.models.decoder.regions import HeadNorms
from holdfast.trainer.models.decoder.rotary import magnitude
from holdfast.trainer.models.decoder.section import (
    LATENT_NORM_EPS,
    DecoderConfig,
    LatentDesign,
    RopeScaling,
)


class LatentAttention(nn.Module):
    """Latent attention over the heads of this rank's parts."""

    def __init__(
        self,
        model: DecoderConfig,
        latent: LatentDesign,
        tp: TensorParallel,
        queue: WeightGradientQueue,
        core: AttentionCore,
        choose: Choice,
    ) -> None:
        super().__init__()
        self._tp, self._queue, self._core, self._latent = tp, queue, core, latent
        self._score_scale = score_scale(model.rope_scaling)
        own, (heads, _), hidden = len(tp.own_parts), core.heads, model.hidden
        self._widths = [latent.query_rank, latent.rank, latent.turning]
        self.down = nn.Parameter(torch.empty(sum(self._widths), hidden))
        self.query_norm = None
        if latent.query_rank:
            self.query_norm = RMSNorm(latent.query_rank, LATENT_NORM_EPS, choose)
        self.key_value_norm = RMSNorm(latent.rank, LATENT_NORM_EPS, choose)
        self.query = stack_of_parts(own, heads * latent.key, latent.query_rank or hidden)
        self.key_value = stack_of_parts(own, heads * (latent.plain + latent.value), latent.rank)
        self.output = stack_of_parts(own, hidden, heads * latent.value)

    def forward(
        self, values: Sequence[Tensor], context: MicroBatchContext, queues: Sequence[Queues]
    ) -> list[Tensor]:
        """The attention of each own slice.

        Args:
            queues: of each slice, for the norms of its latent vectors.
        """
        own = context.slices.own
        projected = [
            self._projected(value, number, by_part)
            for number, value, by_part in zip(own, values, queues, strict=True)
        ]
        without = [HeadNorms()] * len(own)
        mixed = [
            self._core.mixed(part, of_part, without, context)
            for part, of_part in enumerate(zip(*projected, strict=True))
        ]
        return [
            row_linear(
                [self._values(of_part) for of_part in of_slice],
                of_parts(self.output, self._queue.of(number)),
                self._tp,
            )
            for number, of_slice in zip(own, zip(*mixed, strict=True), strict=True)
        ]

    def _projected(self, value: Tensor, number: int, queues: Queues) -> list[Tensor]:
        """The queries, keys and values of slice `number`, of each own part."""
        parts = len(self._tp.own_parts)
        latent = joined_linear([value], self.down, self._queue, number, parts)
        query, key_value, turning = latent.split(self._widths, -1)
        source = value if self.query_norm is None else self.query_norm(query, queues)
        queue = self._queue.of(number)
        queries = column_linear(source, [[w] for w in of_parts(self.query, queue)], self._tp)
        keys_values = column_linear(
            self.key_value_norm(key_value, queues),
            [[weight] for weight in of_parts(self.key_value, queue)],
            self._tp,
        )
        of_all_heads = to_parts(turning, self._tp)
        return [
            self._joined(*of_part)
            for of_part in zip(queries, keys_values, of_all_heads, strict=True)
        ]

    def _joined(self, queries: Tensor, keys_values: Tensor, turning: Tensor) -> Tensor:
        """What the core takes: float[seq, batch, 3 heads key].

        Args:
            queries: float[seq, batch, heads key].
            keys_values: float[seq, batch, heads (plain + value)].
            turning: float[seq, batch, turning]: of the keys of all heads.
        """
        latent, heads = self._latent, self._core.heads[0]
        if self._score_scale != 1.0:
            queries = queries * self._score_scale
        query = queries.unflatten(-1, (heads, -1)).split([latent.plain, latent.turning], -1)
        plain, value = keys_values.unflatten(-1, (heads, -1)).split(
            [latent.plain, latent.value], -1
        )
        key = (plain, turning.unsqueeze(2).expand(-1, -1, heads, -1))
        padded = F.pad(value, (0, latent.key - latent.value))
        return torch.cat([_ordered(*query), _ordered(*key), padded], 2).flatten(2)

    def _values(self, mixed: Tensor) -> Tensor:
        """The output of attention, without what values were filled up with."""
        latent, heads = self._latent, self._core.heads[0]
        if latent.value == latent.key:
            return mixed
        return mixed.unflatten(-1, (heads, -1))[..., : latent.value].flatten(2)


def _ordered(plain: Tensor, turning: Tensor) -> Tensor:
    """A head's elements, those that turn first in each half: pairs lie next to each other in
    `turning`, and half a head apart here.
    """
    first, second = plain.chunk(2, -1)
    return torch.cat([turning[..., 0::2], first, turning[..., 1::2], second], -1)


def score_scale(scaling: RopeScaling) -> float:
    """The factor of scores with scaled rotary embedding, beside 1 / sqrt(elements of a key)."""
    if scaling.rope_type == "default" or not scaling.mscale_all_dim:
        return 1.0
    return magnitude(scaling.factor, scaling.mscale_all_dim) ** 2
