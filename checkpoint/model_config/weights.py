"""The weights that a model has by its config.json. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

_NORMS: Final = ("input_layernorm.weight", "post_attention_layernorm.weight")
_ATTENTION: Final = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
_MLP: Final = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
_QK_NORMS: Final = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_DENSE: Final = (*_NORMS, *_ATTENTION, *_MLP)
_LAYERS: Final[Mapping[str, tuple[str, ...]]] = {
    "llama": _DENSE,
    "qwen2": (*_DENSE, *(f"self_attn.{name}_proj.bias" for name in "qkv")),
    "qwen3": (*_DENSE, *_QK_NORMS),
    "mixtral": (*_NORMS, *_ATTENTION),
    "qwen3_moe": (*_NORMS, *_ATTENTION, *_QK_NORMS),
    "deepseek_v3": (
        *_NORMS,
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
    ),
    "gpt2": tuple(
        f"{name}.{part}"
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for part in ("weight", "bias")
    ),
}
"""By model type: the weights of a layer, without experts and their router."""


def weights_of(config: Mapping[str, Any], layers: int) -> Iterator[str]:
    """The names of a model's weights but those of its head, experts, routers and latent queries.

    Args:
        layers: the number of layers whose weights are among them.
    Returns:
        The names; none of a model type that is not known.
    """
    family = str(config.get("model_type"))
    if family not in _LAYERS:
        return
    if family == "gpt2":
        stem = "transformer.h"
        yield from (f"transformer.{n}.weight" for n in ("wte", "wpe", "ln_f"))
        yield "transformer.ln_f.bias"
    else:
        stem = "model.layers"
        yield from ("model.embed_tokens.weight", "model.norm.weight")
    for layer in range(layers):
        yield from (f"{stem}.{layer}.{name}" for name in _LAYERS[family])
