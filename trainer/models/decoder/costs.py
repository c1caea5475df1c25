"""The costs of a decoder's layers; needs no torch."""

from __future__ import annotations

from typing import NamedTuple

from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.models.decoder.section import (
    DecoderConfig,
    Design,
    ExpertDesign,
    is_windowed,
)

_ALIGNED_BYTES = 64
"""The rows of each expert begin at a multiple of these (expert_parallel.row_multiple): half of them
lie between experts on average."""


class _Attention(NamedTuple):
    """The costs of attention's projections."""

    weights: int
    projected: int
    """The features that they give each token for its queries, keys and values."""
    kept: int
    """The bytes kept beside those features."""


class Costs:
    """The costs of one micro-batch: floating-point operations, and bytes kept for backward.

    Matrix products count 2 operations per multiply-add, causal attention half of its square. Bytes
    follow the tensors that the modules save (Korthikanti et al. 2022, section 4, counts a standard
    layer).
    """

    def __init__(
        self,
        model: DecoderConfig,
        design: Design,
        tensor: int,
        sequence_parallel: bool,
        seq_len: int,
        micro_batch: int,
        precision: str,
    ) -> None:
        self._model, self._design, self._tensor, self._seq_len = model, design, tensor, seq_len
        self._size = size = PRECISIONS[precision].bytes
        self._tokens = tokens = seq_len * micro_batch
        split = tensor if sequence_parallel else 1
        wide = self._wide
        self.hidden_bytes = tokens * model.hidden * size // split
        # Of a norm: its input and its product before the weight, one of them wide (of LayerNorm
        # both), and its output.
        of_norm = size + wide + (wide if design.layer_norm else size)
        self._norm_bytes = self.hidden_bytes // size * of_norm
        # Each head has a copy of its keys where slices do not divide these (context_parallel).
        attended = model.heads * model.dim_per_head
        self.keys_bytes = 2 * tokens * attended * (size + wide) // tensor
        self.embedding_activation_bytes = (18 if design.learned_positions else 9) * tokens
        self._attention = self._of_attention(split)

    @property
    def _wide(self) -> int:
        """The bytes of an element in float32 or wider."""
        return max(4, self._size)

    def _of_attention(self, split: int) -> _Attention:
        model, latent = self._model, self._design.latent
        attended = model.heads * model.dim_per_head
        if latent is None:
            projected = attended + 2 * model.kv_heads * model.dim_per_head
            return _Attention(model.hidden * (projected + attended), projected, 0)
        queries = latent.query_rank or model.hidden
        down = latent.query_rank + latent.rank + latent.turning
        up = queries * attended + latent.rank * model.heads * (latent.plain + latent.value)
        output = model.heads * latent.value * model.hidden
        # What norms of latent vectors keep, as those of hidden states do; values are of as many
        # elements as keys.
        normed = latent.query_rank + latent.rank
        kept = self._tokens * normed * (2 * self._size + self._wide) // split
        return _Attention(model.hidden * down + up + output, 3 * attended, kept)

    def head_flops(self, further: int) -> float:
        """Of the projection to the vocabulary, for the next token and `further` ones."""
        return 2.0 * (1 + further) * self._tokens * self._model.hidden * self._model.vocab

    def core_flops(self, layer: int) -> float:
        """Of a layer's attention: of queries with the keys that they see."""
        window = self._design.window(layer)
        seen = self._seq_len / 2
        if is_windowed(window, self._seq_len):
            seen = window - window * window / (2 * self._seq_len)
        return 4.0 * self._tokens * self._model.heads * self._model.dim_per_head * seen

    def layer_flops(self, layer: int) -> float:
        """Of a layer's forward pass."""
        experts, hidden = self._design.experts_of(layer), self._model.hidden
        wide, router = self._model.intermediate, 0
        if experts is not None:
            wide = experts.per_token * experts.intermediate + experts.shared
            router = experts.count
        matrices = 2 if self._design.gelu else 3
        weights = self._attention.weights + hidden * (matrices * wide + router)
        return 2.0 * self._tokens * weights + self.core_flops(layer)

    def recompute_flops(self, layer: int, recompute: str) -> float:
        """Of what a layer computes again."""
        match recompute:
            case "selective":
                return self.core_flops(layer)
            case "full":
                return self.layer_flops(layer)
        return 0.0

    def layer_activation_bytes(self, layer: int, recompute: str) -> int:
        """What a layer keeps."""
        if recompute == "full":
            return self.hidden_bytes
        model, design, tensor = self._model, self._design, self._tensor
        of_tokens, experts = self._tokens * self._size, design.experts_of(layer)
        wide = model.intermediate if experts is None else experts.shared
        kept = 2 * self._norm_bytes + self._attention.kept
        kept += of_tokens * (2 if design.gelu else 4) * wide // tensor
        if experts is not None:
            kept += self._expert_bytes(experts)
        queries, keys = (heads * model.dim_per_head for heads in (model.heads, model.kv_heads))
        kept += of_tokens * (self._attention.projected + queries) // tensor
        if recompute == "selective" or design.learned_positions:
            return kept
        kept += of_tokens * (2 * queries + keys) // tensor  # rotated, and the output by heads
        if design.head_norms:
            kept += self._tokens * (queries + keys) * (self._size + self._wide) // tensor
        return kept

    def _expert_bytes(self, experts: ExpertDesign) -> int:
        """What all experts of a layer keep: rows of tokens, there and back, and scores."""
        hidden, between = self._model.hidden, experts.count * _ALIGNED_BYTES // (2 * self._size)
        rows = experts.per_token * self._tokens + between
        kept = rows * self._size * 2 * (hidden + experts.intermediate)
        kept += 16 * self._tokens * (experts.count + experts.per_token)
        # The router's input is wide, and takes the place of the norm's output.
        return kept // self._tensor + self.hidden_bytes // self._size * (self._wide - self._size)

    def head_activation_bytes(self, vocab_chunk: int, further: int) -> int:
        """What the head keeps, with the one chunk of logits that is in memory while it computes.

        Args:
            further: the tokens that it predicts beside the next one.
        """
        entry = (1 + further) * self._tokens * self._wide
        logits = vocab_chunk * entry or entry * self._model.vocab // self._tensor
        return self._norm_bytes + logits

    def multi_token_flops(self, layer: int) -> float:
        """Of a layer that predicts a further token, with the product before it."""
        hidden = self._model.hidden
        return self.layer_flops(layer) + 2.0 * self._tokens * 2 * hidden * hidden

    def multi_token_activation_bytes(self, layer: int, recompute: str) -> int:
        """What such a layer keeps, with three norms, the outputs of two of which are joined, and a
        place of the embedding for each token."""
        return (
            self.layer_activation_bytes(layer, recompute)
            + 3 * self._norm_bytes
            + self.embedding_activation_bytes
        )
