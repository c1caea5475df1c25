"""Every key that a model's class has in transformers is honoured, fixed, or known not to matter."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from holdfast.checkpoint.convert.formats.megatron.models import arguments_of, describe
from holdfast.checkpoint.convert.formats.megatron.tokens import token_count, told_vocabulary
from holdfast.checkpoint.convert.formats.megatron.unlike import (
    FIXED_ARGUMENTS,
    odd_arguments,
    odd_settings,
)
from holdfast.checkpoint.model_config import MODEL_TYPES, differing, explicit, unhonoured
from holdfast.checkpoint.model_config.keys import NEUTRAL, PLAIN
from holdfast.trainer.models import family_of
from support.runs.small_runs import make_config

CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "deepseek_v3": "DeepseekV3Config",
    "gpt2": "GPT2Config",
}


def fresh(kind: str) -> Any:
    import transformers

    return getattr(transformers, CLASSES[kind])


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_key_of_a_new_version_of_transformers_is_seen(kind: str) -> None:
    keys, made = MODEL_TYPES[kind], fresh(kind)()
    placed = NEUTRAL | keys.neutral | keys.honoured.keys() | keys.fixed.keys() | PLAIN.keys()
    rope = {"rope_parameters", "rope_theta", "layer_types"}
    assert {k for k in made.to_dict() if k[:1] != "_"} <= placed | rope
    # Each default is the class's own, so a file without the key is understood as it is there.
    for key, value in keys.honoured.items():
        assert getattr(type(made), key, value) == value, key
    for key, values in keys.fixed.items():
        assert getattr(made, key, values[0]) == values[0], key
    assert type(made).default_theta == (keys.rope_theta or 10000.0)
    assert list(unhonoured(made.to_dict())) == []


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_file_that_says_nothing_is_the_model_that_transformers_makes(kind: str) -> None:
    """Both sides fill in what is missing, and come to the same arguments."""
    made = fresh(kind)().to_dict()
    assert arguments_of({"model_type": kind}) == arguments_of(made)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"rope_type": "default", "mrope_section": [1, 1, 2]}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("sliding_window", 64),
        ("logits_scaling", 8.0),
        ("final_logit_softcapping", 30.0),
        ("embedding_multiplier", 12.0),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("is_encoder_decoder", True),
    ],
)
def test_a_key_that_changes_the_function_is_named(key: str, value: Any) -> None:
    config = {"model_type": "llama", key: value}
    [found] = unhonoured(config)
    assert found[0].startswith(key)
    model = make_config().model
    lines = dict(family_of("llama").differences(model, config))
    if key in ("attention_bias", "mlp_bias"):  # which training has, and Megatron has not
        assert lines[f"model.{key}"] == f"model.{key} = False (its config.json has True)"
    else:
        assert f"its config.json has {found[0]}" in lines[f"config.json:{found[0]}"]


@pytest.mark.parametrize(
    "config",
    [
        {"attention_bias": False, "mlp_bias": None, "hidden_act": "silu", "pretraining_tp": 2},
        {"_name_or_path": "x", "torch_dtype": "float16", "temperature": 0.6, "use_cache": True},
        {"rope_scaling": None, "rope_theta": 5e5, "max_sequence_length": 2048},
        {"layer_types": ["full_attention"], "logit_scale": None, "unsloth_version": "2025.1"},
    ],
)
def test_a_key_that_changes_nothing_is_accepted(config: dict[str, Any]) -> None:
    assert list(unhonoured({"model_type": "llama", **config})) == []


def test_rotary_settings_are_taken_from_where_transformers_takes_them() -> None:
    both = {
        "model_type": "llama",
        "rope_scaling": {
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": 1.0},
        "rope_theta": 5e5,
        "max_position_embeddings": 4096,
    }
    theirs = fresh("llama")(**{k: v for k, v in both.items() if k != "model_type"})
    ours = explicit(both)["rope_parameters"]
    assert ours.items() <= theirs.rope_parameters.items()
    assert ours["original_max_position_embeddings"] == 4096
    assert "original_max_position_embeddings of llama3" in " ".join(odd_settings(both))


NEUTRAL_FIELDS = """
    test_mode calculate_per_token_loss add_bias_linear add_qkv_bias gated_linear_unit normalization
    qk_layernorm num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size
    kv_channels layernorm_epsilon num_moe_experts moe_ffn_hidden_size moe_router_topk
    moe_router_pre_softmax activation_func attention_dropout hidden_dropout
    fp32_residual_connection attention_backend apply_query_key_layer_scaling
    attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul masked_softmax_fusion
    persist_layer_norm memory_efficient_layer_norm qk_clip qk_clip_alpha qk_clip_threshold
    log_max_attention_logit mtp_loss_scaling_factor dsa_indexer_n_heads dsa_indexer_head_dim
    dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss linear_conv_kernel_dim
    linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
    init_method output_layer_init_method init_method_std embedding_init_method
    embedding_init_method_std init_model_with_meta_device activation_func_fp8_input_store
    distribute_saved_activations tp_only_amax_red first_last_layers_bf16
    num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 transformer_impl cp_comm_type
    clone_scatter_output_in_embedding disable_parameter_transpose_cache config_logger_dir
    flash_decode batch_invariant_mode symmetric_ar_type mamba_state_dim mamba_head_dim
    mamba_num_groups mamba_num_heads mlp_chunks_for_prefill heterogeneous_block_specs
    hetereogenous_dist_checkpoint quant_recipe fine_grained_activation_offloading offload_modules
    min_offloaded_tensor_size num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    moe_shared_expert_overlap moe_router_load_balancing_type moe_enable_routing_replay
    moe_router_topk_limited_devices moe_router_padding_for_quantization
    moe_router_padding_for_fp8 moe_router_dtype moe_router_bias_update_rate
    moe_router_force_load_balancing moe_grouped_gemm moe_aux_loss_coeff moe_z_loss_coeff
    moe_input_jitter_eps moe_token_dropping moe_token_dispatcher_type moe_enable_deepep
    moe_flex_dispatcher_backend moe_per_layer_logging moe_expert_capacity_factor
    moe_pad_expert_input_to_capacity moe_token_drop_policy moe_layer_recompute moe_permute_fusion
    moe_router_fusion moe_deepep_num_sms moe_hybridep_num_sms
    bias_activation_fusion bias_dropout_fusion apply_rope_fusion fused_single_qkv_rope
"""
"""Fields that config.json describes, or of training, layouts, kernels and types."""
PREFIXES = (
    "use_ recompute_ fp8 fp4 kitchen_ enable_ cuda_graph external_cuda_graph inference_ moe_use_"
)


def test_a_field_of_a_new_version_of_megatron_is_seen() -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer import TransformerConfig

    layout = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    unplaced = [
        name
        for name in fields
        if name not in layout
        and name not in FIXED_ARGUMENTS
        and name not in NEUTRAL_FIELDS.split()
        and not name.startswith(tuple(PREFIXES.split()))
    ]
    assert unplaced == []
    for name, values in FIXED_ARGUMENTS.items():
        assert name not in fields or fields[name].default in values, name


ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "ffn_hidden_size": 16,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}


@pytest.mark.parametrize("name", FIXED_ARGUMENTS)
def test_an_argument_that_changes_the_function_is_named(name: str) -> None:
    assert odd_arguments(ARGUMENTS) == []
    assert odd_arguments({**ARGUMENTS, name: FIXED_ARGUMENTS[name][0]}) == []
    [line] = odd_arguments({**ARGUMENTS, name: "other"})
    assert line.startswith(f"{name} = 'other'")


def test_arguments_of_no_model_type_are_named() -> None:
    [line] = odd_arguments({**ARGUMENTS, "normalization": "LayerNorm"})
    assert "normalization = 'LayerNorm'" in line
    experts = {**ARGUMENTS, "num_experts": 4}
    assert odd_arguments(experts) == []
    [line] = odd_arguments({**experts, "moe_router_pre_softmax": True})
    assert "pre_softmax" in line


YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
}


def test_a_window_of_megatrons_counts_the_keys_beside_the_query() -> None:
    """As its own mask does; what lies to the right, or has layers without, is named."""
    mistral = {**ARGUMENTS, "window_size": (4, 0)}
    assert odd_arguments(mistral) == []
    described = describe({**mistral, "query_groups": 2}, 8, ())
    assert described is not None
    assert (described["model_type"], described["sliding_window"]) == ("mistral", 5)
    for window in ((4, 1), (4, -1), (4,), 4):
        [line] = odd_arguments({**ARGUMENTS, "window_size": window})
        assert line.startswith(f"window_size = {window!r}")
    [line] = odd_arguments({**mistral, "window_attn_skip_freq": 2})
    assert line.startswith("window_attn_skip_freq = 2")
    [line] = odd_arguments({**mistral, "add_qkv_bias": True})  # a Qwen2, which has none
    assert line.startswith("window_size = (4, 0)")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1e-5),
        ("topk_group", 2),
        ("norm_topk_prob", False),
        ("num_key_value_heads", 8),
        ("n_shared_experts", 0),
        ("rope_parameters", {**YARN, "beta_fast": 16}),
        ("rope_parameters", {**YARN, "original_max_position_embeddings": 2048}),
        ("rope_parameters", {**YARN, "mscale_all_dim": 1.0}),
        ("rope_parameters", {**YARN, "truncate": False}),
    ],
)
def test_a_setting_of_deepseek_that_megatron_has_not_is_named(key: str, value: Any) -> None:
    config = {"model_type": "deepseek_v3", "rope_parameters": YARN}
    assert list(odd_settings(config)) == []
    [line] = odd_settings({**config, key: value})
    name = set(value.items()) - set(YARN.items()) if isinstance(value, dict) else {(key, value)}
    assert line.startswith(next(iter(name))[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_epsilon", 1e-5),
        ("qk_layernorm", False),
        ("add_qkv_bias", True),
        ("moe_router_score_function", "softmax"),
        ("moe_router_enable_expert_bias", False),
        ("moe_shared_expert_intermediate_size", None),
        ("moe_shared_expert_intermediate_size", 2049),
        ("moe_layer_freq", [1] * 58 + [0] * 3),
        ("moe_layer_freq", 2),
        ("moe_router_group_topk", 2),
        ("moe_shared_expert_gate", True),
    ],
)
def test_an_argument_of_latent_attention_that_deepseek_has_not_is_named(
    name: str, value: Any
) -> None:
    told = arguments_of({"model_type": "deepseek_v3", "rope_parameters": YARN})
    assert odd_arguments(told) == []
    described = describe(told, 129280, ("lm_head.weight",))
    assert described is not None
    assert list(differing(described, {"model_type": "deepseek_v3", "rope_parameters": YARN})) == []
    [line] = odd_arguments({**told, name: value})
    assert line.startswith(name)


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_yarn_and_windows_come_back_from_megatrons_arguments(kind: str) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.5,
        "mscale_all_dim": 0.25,
    }
    config = {"model_type": kind, "rope_parameters": rope}
    told = {**arguments_of(config), "query_groups": 8}
    described = describe(told, 32000, (), kind)
    assert described is not None
    assert described["model_type"] == kind
    assert described["rope_parameters"] == rope
    # Words that transformers follows only where both are there become the factor itself.
    alone = describe({**told, "mscale_all_dim": 0.0}, 32000, (), kind)
    assert alone is not None
    assert alone["rope_parameters"]["attention_factor"] == pytest.approx(
        0.05 * math.log(4.0) + 1.0, rel=1e-15
    )


@pytest.mark.parametrize(
    ("kind", "size", "tokens"),
    [
        (None, 250, 250),
        ("NullTokenizer", 256, 257),
        ("NullMultimodalTokenizer", 256, 257),
        ("TikTokenizer", 1000, 1000),
        ("TikTokenizer", None, 131072),
        ("HuggingFaceTokenizer", 250, None),
        ("GPT2BPETokenizer", None, None),
        ("Llama2Tokenizer", 32000, None),
    ],
)
def test_a_vocabulary_has_the_tokens_that_its_tokenizer_counts(
    kind: str | None, size: int | None, tokens: int | None
) -> None:
    arguments = {"tokenizer_type": kind, "vocab_size": size}
    assert token_count(arguments) == tokens
    if tokens is not None and size is not None:
        assert told_vocabulary(arguments, tokens) == size


@pytest.mark.parametrize("size", [100, 256])
def test_megatrons_null_tokenizer_counts_the_same(size: int) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    arguments = {"tokenizer_type": "NullTokenizer", "vocab_size": size}
    assert token_count(arguments) == NullTokenizer(size).vocab_size
