"""A Llama model as Hugging Face's `config.json`, and the comparison with one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.checkpoint.model_config import explicit, unhonoured
from holdfast.trainer.models.section import ModelConfig


def config_json(model: ModelConfig, seq_len: int, dtype: str) -> dict[str, Any]:
    """The `config.json` of LlamaForCausalLM. Pure.

    Args:
        seq_len: the length of its training sequences, in tokens.
        dtype: the dtype of its weights, by torch's name.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.dim_per_head,
        "vocab_size": model.vocab,
        "max_position_embeddings": max(model.max_seq_len, seq_len),
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
    }


def differences(model: ModelConfig, described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The differences between a `config.json` and the model: key and line of each. Pure.

    A missing key has the value that transformers takes for it. A key that changes the function
    and has no counterpart in [model] is a difference by its name.
    """
    told = explicit(described)
    rope = told.get("rope_parameters") or {}
    heads, hidden = told.get("num_attention_heads"), told.get("hidden_size")
    pairs = {
        "family": (described.get("model_type"), model.family),
        "layers": (told.get("num_hidden_layers"), model.layers),
        "hidden": (hidden, model.hidden),
        "intermediate": (told.get("intermediate_size"), model.intermediate),
        "heads": (heads, model.heads),
        "kv_heads": (told.get("num_key_value_heads") or heads, model.kv_heads),
        "head_dim": (
            told.get("head_dim") or (hidden // heads if hidden and heads else None),
            model.dim_per_head,
        ),
        "vocab": (told.get("vocab_size"), model.vocab),
        "norm_eps": (told.get("rms_norm_eps"), model.norm_eps),
        "rope_theta": (rope.get("rope_theta"), model.rope_theta),
        "tie_embeddings": (told.get("tie_word_embeddings"), model.tie_embeddings),
        "rope scaling": (rope.get("rope_type"), "default"),
    }
    for key, (theirs, mine) in pairs.items():
        if theirs != mine:
            name = f"model.{key}" if key.isidentifier() else "config.json:rope_type"
            yield name, f"model.{key} = {mine!r} (its config.json has {theirs!r})"
    if described.get("model_type") == model.family:
        for key, value, accepted in unhonoured(described):
            line = f"its config.json has {key} = {json.dumps(value)} ({accepted})"
            yield f"config.json:{key}", line
