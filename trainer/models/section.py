"""The `[model]` section of a configuration: the keys that model families share. Needs no torch."""

from __future__ import annotations

import msgspec

from holdfast.trainer.models.sizes import default_heads, default_intermediate, default_kv_heads


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model to train. `family`, `layers` and `hidden` are required. A field for each key.

    A size of 0 is unset; `heads`, `kv_heads` and `intermediate` then follow from the others, as the
    section is made. They depend on no other section, so that a model is the same in every layout.
    A family with keys of its own derives its section from this one; see `Family.section`.
    """

    family: str
    """A name of `FAMILIES`: the Hugging Face architecture (`model_type`) that the model matches."""
    layers: int
    """The number of transformer layers."""
    hidden: int
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    """The number of key and value heads of grouped-query attention."""
    head_dim: int = 0
    """0: hidden / heads."""
    vocab: int = 0
    """0: the tokenizer's; `convert_config` sets it."""
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
    from_hf: str = ""
    """The Hugging Face folder with whose weights training begins; it gives the keys that are not
    set. Empty: weights are drawn."""

    def __post_init__(self) -> None:
        heads = self.heads or default_heads(self.hidden, self.head_dim)
        for name, value in (
            ("heads", heads),
            ("kv_heads", self.kv_heads or default_kv_heads(heads)),
            ("intermediate", self.intermediate or default_intermediate(self.hidden)),
        ):
            msgspec.structs.force_setattr(self, name, value)

    @property
    def dim_per_head(self) -> int:
        """The number of elements of one attention head."""
        return self.head_dim or self.hidden // self.heads
