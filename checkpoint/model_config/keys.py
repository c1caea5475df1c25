"""The keys of config.json for each model type, as data. Needs no torch and no transformers.

A key is in one of three sets: its value is honoured, only some values are accepted, or it does not
matter to what the model computes. A test compares the sets with the classes of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one model type."""

    honoured: Mapping[str, Any]
    """The keys whose values are honoured, each with the value that transformers takes for a
    missing key."""
    fixed: Mapping[str, tuple[Any, ...]]
    """The keys of which only these values are accepted; the first is that of a missing key."""
    neutral: frozenset[str]
    """The keys, beside `NEUTRAL`, that do not change the function of a trained model."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """The name in `honoured` by another name that transformers accepts."""
    rope_theta: float = 10000.0
    """The base of rotary embedding where nothing says it; 0: the model has none."""
    prefix: str = "model."
    """The prefix of all weights but the head's, which a bare base model is saved without."""
    further_layers: str = ""
    """The key with the number of layers behind `num_hidden_layers` that published folders have for
    the prediction of further tokens; empty: there are none."""
    buffers: tuple[str, ...] = (
        "{name}.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "{name}.position_ids",
    )
    """The patterns of tensors that published folders contain and the model computes by itself."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEUTRAL: Final = _words(
    # What the files are, and how they came to be.
    "architectures auto_map custom_pipelines dtype model_type name_or_path problem_type "
    "task_specific_params torch_dtype transformers_version transformers.js_config "
    # Special tokens and the settings of generation.
    "begin_suppress_tokens bos_token bos_token_id decoder_start_token_id eos_token eos_token_id "
    "forced_bos_token_id forced_eos_token_id pad_token pad_token_id prefix sep_token_id "
    "suppress_tokens tokenizer_class unk_token_id bad_words_ids diversity_penalty do_sample "
    "early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty "
    "max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_scores remove_invalid_values repetition_penalty "
    "return_dict_in_generate temperature top_k top_p typical_p use_cache "
    # Outputs, other heads, and old settings of every model.
    "finetuning_task id2label label2id num_labels output_attentions output_hidden_states "
    "output_router_logits return_dict chunk_size_feed_forward cross_attention_hidden_size "
    "tf_legacy_loss torchscript use_bfloat16 "
    # Training, and the form of the computation.
    "attention_dropout gradient_checkpointing hidden_dropout initializer_range "
    "max_position_embeddings pretraining_tp router_aux_loss_coef router_jitter_noise "
    "embd_pdrop attn_pdrop resid_pdrop attn_implementation use_flash_attention "
    "max_sequence_length seq_length unsloth_fixed unsloth_version model_max_length "
    "tokenizer_model_max_length tokenizer_padding_side"
)
"""The keys that do not change the function of any model; names with a leading underscore too."""
PLAIN: Final[Mapping[str, tuple[Any, ...]]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "per_layer_config": (None,),
}
"""The keys that every model may have, and the values that change nothing."""
ROPE_KEYS: Final = _words(
    "rope_type type rope_theta factor low_freq_factor high_freq_factor "
    "original_max_position_embeddings partial_rotary_factor beta_fast beta_slow attention_factor "
    "mscale mscale_all_dim truncate"
)
"""The keys of rotary embedding that are honoured, or belong to a kind that is refused."""
_SIZES: Final[Mapping[str, Any]] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "head_dim": None,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
_SILU: Final[tuple[Any, ...]] = ("silu", "swish")
_QWEN: Final[Mapping[str, Any]] = {
    **_SIZES,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_FULL: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_act": _SILU,
    "use_sliding_window": (False,),
    "use_mrope": (False,),
}
_WINDOWS: Final = frozenset({"sliding_window", "max_window_layers"})
"""The keys that are read only with `use_sliding_window`."""

MODEL_TYPES: Final[Mapping[str, ModelKeys]] = {
    "llama": ModelKeys(
        honoured=_SIZES,
        fixed={"hidden_act": _SILU, "attention_bias": (False,), "mlp_bias": (False,)},
        neutral=frozenset(),
    ),
    "mistral": ModelKeys(
        honoured={
            **_SIZES,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        fixed={"hidden_act": _SILU},
        neutral=frozenset(),
    ),
    "qwen2": ModelKeys(honoured=_QWEN, fixed=_FULL, neutral=_WINDOWS),
    "qwen3": ModelKeys(
        honoured={**_QWEN, "head_dim": 128},
        fixed={**_FULL, "attention_bias": (False,)},
        neutral=_WINDOWS,
    ),
    "mixtral": ModelKeys(
        honoured={
            **_SIZES,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        fixed={"hidden_act": _SILU, "sliding_window": (None,)},
        neutral=frozenset(),
        aliases={"num_experts": "num_local_experts"},
        rope_theta=1e6,
    ),
    "qwen3_moe": ModelKeys(
        honoured={
            **_QWEN,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.001,
            "norm_topk_prob": False,
        },
        fixed={
            **_FULL,
            "attention_bias": (False,),
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
        },
        neutral=_WINDOWS,
        aliases={"num_experts": "num_local_experts"},
    ),
    "deepseek_v3": ModelKeys(
        honoured={
            **_SIZES,
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        fixed={
            "hidden_act": _SILU,
            "attention_bias": (False,),
            "rope_interleave": (True, None),
            "moe_layer_freq": (1, None),
            "scoring_func": ("sigmoid", None),
            "topk_method": ("noaux_tc", None),
        },
        # The layers that predict further tokens do not change what the model computes.
        neutral=_words("num_nextn_predict_layers aux_loss_alpha seq_aux ep_size qk_head_dim"),
        aliases={
            "num_local_experts": "n_routed_experts",
            "num_mtp_layers": "num_nextn_predict_layers",
        },
        further_layers="num_nextn_predict_layers",
    ),
    "gpt2": ModelKeys(
        honoured={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        neutral=_words(
            "n_ctx reorder_and_upcast_attn summary_type summary_use_proj summary_activation "
            "summary_proj_to_labels summary_first_dropout"
        ),
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        rope_theta=0.0,
        prefix="transformer.",
        buffers=(
            "{name}.attn.bias",
            "{name}.attn.masked_bias",
        ),
    ),
}
"""The model types that are converted to Megatron, or that training starts from."""
