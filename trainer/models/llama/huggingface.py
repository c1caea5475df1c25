"""A Llama model as Hugging Face's `config.json`, and the comparison with one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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


def differences(model: ModelConfig, described: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The keys that differ in a `config.json`: (key, its value, the model's). Pure.

    Missing keys count as equal.
    """
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    pairs = {
        "family": (described.get("model_type"), model.family),
        "layers": (described.get("num_hidden_layers"), model.layers),
        "hidden": (described.get("hidden_size"), model.hidden),
        "intermediate": (described.get("intermediate_size"), model.intermediate),
        "heads": (described.get("num_attention_heads"), model.heads),
        "kv_heads": (described.get("num_key_value_heads"), model.kv_heads),
        "head_dim": (described.get("head_dim"), model.dim_per_head),
        "vocab": (described.get("vocab_size"), model.vocab),
        "norm_eps": (described.get("rms_norm_eps"), model.norm_eps),
        "rope_theta": (rope.get("rope_theta") or described.get("rope_theta"), model.rope_theta),
        "tie_embeddings": (described.get("tie_word_embeddings"), model.tie_embeddings),
        "rope scaling": (kind, "default"),
    }
    for key, (theirs, mine) in pairs.items():
        if theirs not in (None, mine):
            yield key, theirs, mine
