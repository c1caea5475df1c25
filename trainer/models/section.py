"""The `[model]` section of a configuration: the keys that model families share. Needs no torch."""

from __future__ import annotations

import msgspec


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model to train. `family`, `layers` and `hidden` are required. A field for each key.

    A family with keys of its own derives its section from this one; see `Family.section`.
    """

    family: str
    """A name of `FAMILIES`: the Hugging Face architecture (`model_type`) that the model matches."""
    layers: int
    """The number of transformer layers."""
    hidden: int
    intermediate: int = 224
    heads: int = 6
    kv_heads: int = 3
    """The number of key and value heads of grouped-query attention."""
    head_dim: int = 0
    """0: hidden / heads."""
    vocab: int = 320
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    dropout: float = 0.0
    """The probability, for the embedding's output and for the output of each attention and MLP."""
    norm_eps: float = 1e-5
    """Added to the mean square in norms."""
    rope_theta: float = 10000.0
    init_std: float = 0.02
    """The standard deviation of the initial weights; that of output projections is divided by
    sqrt(2 layers)."""

    @property
    def dim_per_head(self) -> int:
        """The number of elements of one attention head."""
        return self.head_dim or self.hidden // self.heads
