"""The costs of a decoder's layers; needs no torch."""

from __future__ import annotations

from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.models.decoder.section import DecoderConfig, Design, is_windowed


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
        size = PRECISIONS[precision].bytes
        tokens, dim = seq_len * micro_batch, model.dim_per_head
        attention = model.heads * dim
        projected = attention + 2 * model.kv_heads * dim
        wide, router = model.intermediate, 0
        if design.experts is not None:
            wide = design.experts.per_token * design.experts.intermediate
            router = design.experts.count
        # Of each feature of an MLP: the weights, and the values that are kept.
        matrices, features = (2, 2) if design.gelu else (3, 4)
        weights = model.hidden * (projected + attention + matrices * wide + router)
        self._per_key, self._seq_len, self._design = 4.0 * tokens * attention, seq_len, design
        self._products = 2.0 * tokens * weights
        self.head_flops = 2.0 * tokens * model.hidden * model.vocab
        split = tensor if sequence_parallel else 1
        hidden_bytes = tokens * model.hidden * size // split
        # Each head has a copy of its keys where slices do not divide these (context_parallel).
        self.keys_bytes = 2 * tokens * attention * (size + max(4, size)) // tensor
        rotated = 0 if design.learned_positions else 2 * attention
        core_bytes = tokens * size * (projected + rotated) // tensor
        mlp_bytes = tokens * size * features * wide // tensor
        if design.experts is not None:  # rows at the experts and back, and the router's scores
            rows = 2 * design.experts.per_token * model.hidden * size
            mlp_bytes += tokens * (rows + 8 * design.experts.count) // tensor
        norms_bytes = 4 * hidden_bytes
        if design.layer_norm:  # its input and what its weight is multiplied with are wide
            norms_bytes = 2 * hidden_bytes * (size + 2 * max(4, size)) // size
        kept = norms_bytes + mlp_bytes + tokens * size * attention // tensor
        self.hidden_bytes = hidden_bytes
        self.layer_activation_bytes = {
            "none": kept + core_bytes,
            "selective": kept + tokens * size * projected // tensor,
            "full": hidden_bytes,
        }
        self.embedding_activation_bytes = (18 if design.learned_positions else 9) * tokens
        wide = max(4, size)
        self.logits_bytes = tokens * model.vocab * wide // tensor
        self.chunk_entry_bytes = tokens * wide

    def core_flops(self, layer: int) -> float:
        """Of a layer's attention: of queries with the keys that they see."""
        window = self._design.window(layer)
        seen = self._seq_len / 2
        if is_windowed(window, self._seq_len):
            seen = window - window * window / (2 * self._seq_len)
        return self._per_key * seen

    def layer_flops(self, layer: int) -> float:
        """Of a layer's forward pass."""
        return self._products + self.core_flops(layer)

    def recompute_flops(self, layer: int, recompute: str) -> float:
        """Of what a layer computes again."""
        match recompute:
            case "selective":
                return self.core_flops(layer)
            case "full":
                return self.layer_flops(layer)
        return 0.0

    def head_activation_bytes(self, vocab_chunk: int) -> int:
        """What the head keeps, with the one chunk of logits that is in memory while it computes."""
        chunk = vocab_chunk * self.chunk_entry_bytes
        return 2 * self.hidden_bytes + (chunk or self.logits_bytes)
