"""transformers' models with our weights, made from the config.json that is saved beside these."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import torch
from torch import Tensor

from holdfast.parallel.pipeline import Batch, Documents, MicroBatchContext
from holdfast.trainer.models import FAMILIES, ModelConfig, build_whole_model, family_of

SIZES: dict[str, Any] = {
    "layers": 3,
    "hidden": 32,
    "intermediate": 40,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 37,
    "max_seq_len": 32,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
DEEPSEEK: dict[str, Any] = {
    "family": "deepseek_v3",
    "kv_heads": 4,
    "experts": 8,
    "experts_per_token": 3,
    "expert_intermediate": 12,
    "expert_groups": 4,
    "groups_per_token": 2,
    "dense_layers": [0],
    "query_rank": 12,
    "key_value_rank": 10,
    "plain_head_dim": 8,
    "rope_head_dim": 4,
    "value_head_dim": 8,
}
MODELS: list[dict[str, Any]] = [
    {"family": "llama"},
    {"family": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    {"family": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {
        "family": "llama",
        "rope_theta": 100.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    {
        "family": "llama",
        "rope_theta": 500.0,
        "rope_scaling": YARN,
    },
    {
        "family": "llama",
        "rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    },
    {"family": "mistral"},
    {"family": "mistral", "sliding_window": 5, "head_dim": 16},
    {"family": "mixtral", "experts": 4},
    {"family": "mixtral", "experts": 6, "experts_per_token": 3, "sliding_window": 7},
    {"family": "qwen3_moe", "experts": 8, "expert_intermediate": 12, "experts_per_token": 3},
    {
        "family": "qwen3_moe",
        "experts": 16,
        "expert_intermediate": 8,
        "experts_per_token": 1,
        "norm_topk_prob": False,
    },
    {
        "family": "qwen3_moe",
        "experts": 4,
        "expert_intermediate": 12,
        "dense_layers": [1],
    },
    DEEPSEEK,
    DEEPSEEK
    | {
        "experts_per_token": 4,
        "expert_groups": 1,
        "groups_per_token": 1,
        "norm_topk_prob": False,
        "shared_experts": 2,
        "query_rank": 0,
        "value_head_dim": 10,
        "rope_theta": 500.0,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    },
    {"family": "qwen2", "tie_embeddings": True},
    {"family": "qwen2", "sliding_window": 4, "max_window_layers": 1},
    {"family": "qwen3", "head_dim": 12},
    {"family": "qwen3", "attention_bias": True, "sliding_window": 6, "max_window_layers": 2},
    {"family": "gpt2", "kv_heads": 0},
    {"family": "gpt2", "kv_heads": 0, "activation": "gelu", "tie_embeddings": False},
]
"""Small models of every family, with each thing that sets it apart."""


def small_model(**keys: Any) -> ModelConfig:
    """The section of a small model."""
    assert keys["family"] in FAMILIES
    return msgspec.convert({**SIZES, **keys}, family_of(keys["family"]).section)


def our_model(model: ModelConfig, dtype: torch.dtype, **arguments: Any) -> Any:
    """Our modules, with weights that are not alike: also norms and biases are drawn."""
    chunk = build_whole_model(
        model,
        dtype=dtype,
        device=torch.device("cpu"),
        seq_len=24,
        micro_batch=2,
        seed=7,
        **arguments,
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in chunk.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise.to(dtype)
        else:
            parameter.data *= 8.0  # scores that differ, so that attention is not even
    return chunk


def by_name(chunk: Any, values: Any) -> dict[str, Tensor]:
    """Tensors of local parameters, joined under their logical names.

    Args:
        values: parameter -> the tensor.
    """
    found: dict[str, Tensor] = {}
    for (*_, spec), parameter in chunk.rows():
        part = values(parameter)[spec.local_row : spec.local_row + spec.rows]
        whole = found.setdefault(spec.name, torch.zeros(spec.shape, dtype=part.dtype))
        here = tuple(slice(*ends) for ends in zip(spec.box.start, spec.box.stop, strict=True))
        if values.__name__ == "gradient_of":
            whole[here] += part
        else:
            whole[here] = part
    return found


def value_of(parameter: Any) -> Tensor:
    return parameter.detach()


def gradient_of(parameter: Any) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def their_model(model: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """transformers' model of our config.json, with these weights."""
    import transformers

    described = dict(family_of(model.family).config_json(model, 16, str(dtype)[6:]))
    described.pop("dtype")
    kind = described.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **described)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # others have no float64
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    missing, unexpected = theirs.load_state_dict(fused(weights), strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set())
    theirs.tie_weights()
    return theirs


EXPERT = re.compile(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that transformers has in memory, where experts are stacked."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, value in weights.items():
        expert = EXPERT.fullmatch(name)
        if expert is None:
            found[name.replace("block_sparse_moe", "mlp")] = value
            continue
        kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(expert[3], expert[3])
        stacks.setdefault(expert[1], {}).setdefault(int(expert[2]), {})[kind] = value
    for layer, experts in stacks.items():
        ordered = [experts[number] for number in range(len(experts))]
        both = [torch.cat([one["gate_proj"], one["up_proj"]]) for one in ordered]
        found[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        found[f"{layer}.mlp.experts.down_proj"] = torch.stack([one["down_proj"] for one in ordered])
    return found


def tokens_of(model: ModelConfig, sequences: int, length: int) -> Tensor:
    return torch.randint(
        model.vocab, (sequences, length), generator=torch.Generator().manual_seed(5)
    )


def context_of(tokens: Tensor, documents: Documents | None = None) -> MicroBatchContext:
    """The context of a training pass; each token predicts the next."""
    return MicroBatchContext(0, 0, True, Batch(tokens[:, :-1], tokens[:, 1:], documents))
