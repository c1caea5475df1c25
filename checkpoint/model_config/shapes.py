"""The sizes in a config.json and the shapes of the weights beside it, compared. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from holdfast.checkpoint.model_config.checks import explicit
from holdfast.checkpoint.model_config.keys import MODEL_TYPES, NEUTRAL
from holdfast.checkpoint.model_config.weights import weights_of

_LAYER: Final = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.*)")
_EXPERT: Final = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
_LAYERS: Final = ("num_hidden_layers", "n_layer")
_QUERY, _KEY = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
_LLAMA: Final[Mapping[str, tuple[str, ...]]] = {
    "model.embed_tokens.weight": ("vocab_size", "hidden_size"),
    "model.norm.weight": ("hidden_size",),
    "lm_head.weight": ("vocab_size", "hidden_size"),
    "input_layernorm.weight": ("hidden_size",),
    "self_attn.q_proj.weight": (_QUERY, "hidden_size"),
    "self_attn.k_proj.weight": (_KEY, "hidden_size"),
    "self_attn.v_proj.weight": (_KEY, "hidden_size"),
    "self_attn.o_proj.weight": ("hidden_size", _QUERY),
    "self_attn.q_norm.weight": ("head_dim",),
    "self_attn.k_norm.weight": ("head_dim",),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
    "mlp.gate.weight": ("num_local_experts", "hidden_size"),
    "mlp.experts.gate_proj.weight": ("moe_intermediate_size", "hidden_size"),
    "mlp.experts.up_proj.weight": ("moe_intermediate_size", "hidden_size"),
    "mlp.experts.down_proj.weight": ("hidden_size", "moe_intermediate_size"),
    "block_sparse_moe.gate.weight": ("num_local_experts", "hidden_size"),
    "block_sparse_moe.experts.w1.weight": ("intermediate_size", "hidden_size"),
    "block_sparse_moe.experts.w3.weight": ("intermediate_size", "hidden_size"),
    "block_sparse_moe.experts.w2.weight": ("hidden_size", "intermediate_size"),
}
_DEEPSEEK_QUERY: Final = "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)"
_DEEPSEEK: Final[Mapping[str, tuple[str, ...]]] = {
    **{name: keys for name, keys in _LLAMA.items() if "self_attn" not in name},
    "self_attn.q_proj.weight": (_DEEPSEEK_QUERY, "hidden_size"),
    "self_attn.q_a_proj.weight": ("q_lora_rank", "hidden_size"),
    "self_attn.q_b_proj.weight": (_DEEPSEEK_QUERY, "q_lora_rank"),
    "self_attn.kv_a_proj_with_mqa.weight": ("kv_lora_rank + qk_rope_head_dim", "hidden_size"),
    "self_attn.kv_b_proj.weight": (
        "num_attention_heads * (qk_nope_head_dim + v_head_dim)",
        "kv_lora_rank",
    ),
    "self_attn.o_proj.weight": ("hidden_size", "num_attention_heads * v_head_dim"),
    "mlp.gate.weight": ("n_routed_experts", "hidden_size"),
    "mlp.shared_experts.gate_proj.weight": (
        "n_shared_experts * moe_intermediate_size",
        "hidden_size",
    ),
}
_GPT2: Final[Mapping[str, tuple[str, ...]]] = {
    "transformer.wte.weight": ("vocab_size", "n_embd"),
    "transformer.wpe.weight": ("n_positions", "n_embd"),
    "transformer.ln_f.weight": ("n_embd",),
    "lm_head.weight": ("vocab_size", "n_embd"),
    "attn.c_attn.weight": ("n_embd", "3 * n_embd"),
    "attn.c_proj.weight": ("n_embd", "n_embd"),
    "mlp.c_fc.weight": ("n_embd", "n_inner"),
    "mlp.c_proj.weight": ("n_inner", "n_embd"),
}
"""By the name of a weight, without the numbers of its layer and expert, the key of each extent."""
_COMMON: Final = ("model.embed_tokens.weight", "input_layernorm.weight")
"""The names of weights that have the same shapes in models of every other type, too."""
_TYPES: Final = {
    **dict.fromkeys(MODEL_TYPES, _LLAMA),
    "gpt2": _GPT2,
    "deepseek_v3": _DEEPSEEK,
}
_YARN: Final[Mapping[str, Any]] = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""The settings of YaRN that transformers takes where they are missing."""
_HEADED: Final = ("ForCausalLM", "LMHeadModel")
"""The ends of names of classes that have a head."""


def contradictions(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """What a config.json says of sizes and the weights contradict, one line for each key.

    Of a model type that is not known, few keys are compared.

    Args:
        shapes: the shape of each weight, by its name in transformers.
    """
    kind = str(config.get("model_type"))
    names = _TYPES.get(kind) or {name: _LLAMA[name] for name in _COMMON}
    told = explicit(config)
    sizes = _sizes(told)
    numbers = {int(found[1]) for name in shapes if (found := _LAYER.fullmatch(name))}
    layers = next((sizes[key] for key in _LAYERS if sizes.get(key) is not None), None)
    numbers -= set(further_layers(config, numbers))
    count = max(numbers, default=-1) + 1
    # Models of other types may keep layers for other tasks behind these.
    if numbers and layers is not None and (count < layers or (kind in _TYPES and count > layers)):
        key = next(key for key in _LAYERS if sizes.get(key) is not None)
        yield f"{key} = {layers}, and the weights have {count} layers"
    if kind in MODEL_TYPES and not told["tie_word_embeddings"] and "lm_head.weight" not in shapes:
        classes = config.get("architectures") or [""]
        if numbers and isinstance(classes, list) and str(classes[0]).endswith(_HEADED):
            yield "tie_word_embeddings = false, and there is no lm_head.weight"
    yield from _unlike(names, sizes, shapes)
    if layers in (count, None) or not numbers:
        # The numbers are those of files: no more layers are looked for than there are, and one.
        yield from _missing(config, shapes, min(count, len(numbers) + 1) or min(1, layers or 0))


def further_layers(config: Mapping[str, Any], numbers: Iterable[int]) -> list[int]:
    """The layers among these that predict further tokens, behind those of the model. Pure."""
    keys = MODEL_TYPES.get(str(config.get("model_type")))
    if keys is None or not keys.further_layers:
        return []
    told = explicit(config)
    first, count = told.get("num_hidden_layers"), told.get(keys.further_layers, 1)
    if not isinstance(first, int) or not isinstance(count, int):
        return []
    return [number for number in sorted(numbers) if first <= number < first + count]


def _missing(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], layers: int
) -> Iterator[str]:
    """The weights that the model has and its files lack; those of quantised ones have other names.

    transformers would draw them at random.
    """
    wanted = [] if config.get("quantization_config") else weights_of(config, layers)
    missing = [name for name in wanted if name not in shapes]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        named = ", ".join(missing[:3]) + more
        yield f"model_type = {config['model_type']}, and the weights are without {named}"


def _unlike(
    names: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[str]:
    """The keys whose values are not the extents of weights, each with the first such weight."""
    told: set[str] = set()
    for name, shape in shapes.items():
        layer = _LAYER.fullmatch(name)
        base = name if layer is None else layer[2]
        expert = _EXPERT.fullmatch(base)
        keys = names.get(base if expert is None else f"{expert[1]}.{expert[3]}", ())
        if len(keys) != len(shape):
            continue
        for number, (key, extent) in enumerate(zip(keys, shape, strict=True)):
            if sizes.get(key) not in (extent, None) and key not in told:
                told.add(key)
                yield f"{key} = {sizes[key]!r}, and {name} has {extent} in dimension {number}"


def _sizes(told: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, and the values that are computed from them, with None for what is not a number."""
    sizes = {key: value if _is_size(value) else None for key, value in told.items()}
    if "n_embd" in sizes:
        hidden = sizes["n_embd"]
        sizes["n_inner"] = sizes.get("n_inner") or (hidden and 4 * hidden)
        sizes["3 * n_embd"] = hidden and 3 * hidden
        return sizes
    if "kv_lora_rank" in sizes:
        return _with_latent_sizes(sizes)
    hidden, heads = sizes.get("hidden_size"), sizes.get("num_attention_heads")
    dim = sizes.get("head_dim") or (hidden // heads if hidden and heads else None)
    # A known type has the key; of another, transformers' value of a missing one is not known.
    groups = sizes["num_key_value_heads"] or heads if "num_key_value_heads" in sizes else None
    return {
        **sizes,
        "head_dim": dim,
        _QUERY: heads and dim and heads * dim,
        _KEY: groups and dim and groups * dim,
    }


def _with_latent_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes of latent attention, and of experts that all tokens go to."""
    names = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    heads, plain, turning, value = (sizes.get(name) or 0 for name in names)
    shared, wide = sizes.get("n_shared_experts"), sizes.get("moe_intermediate_size")
    return {
        **sizes,
        "head_dim": sizes.get("head_dim") or turning,
        _DEEPSEEK_QUERY: heads * (plain + turning),
        "kv_lora_rank + qk_rope_head_dim": (sizes["kv_lora_rank"] or 0) + turning,
        "num_attention_heads * (qk_nope_head_dim + v_head_dim)": heads * (plain + value),
        "num_attention_heads * v_head_dim": heads * value,
        "n_shared_experts * moe_intermediate_size": shared and wide and shared * wide,
    }


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def differing(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """The keys by which two files config.json describe models of different functions.

    Returns:
        (key, its value in the first, its value in the second); only the model type if that differs.
    """
    kinds = first.get("model_type"), second.get("model_type")
    if kinds[0] != kinds[1]:
        yield ("model_type", *kinds)
        return
    if str(kinds[0]) not in MODEL_TYPES:
        return
    one, other = (_whole(explicit(config)) for config in (first, second))
    for key in (*MODEL_TYPES[str(kinds[0])].honoured, "rope_parameters"):
        if key not in NEUTRAL and one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def _whole(told: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with the values that are computed from others where they are missing."""
    sizes = _sizes(told)
    found = dict(told)
    for key in ("head_dim", "n_inner"):
        if key in sizes:
            found[key] = sizes[key]
    rope = found.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type") == "yarn":
        given = {key: value for key, value in rope.items() if value is not None}
        found["rope_parameters"] = {**_YARN, **given}
    if "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    return found
