"""Suggestions for a key of a configuration that does not exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

import msgspec

_NEAR = 0.75
"""How alike names are, of 1, that one is suggested for the other: a slip of the pen."""
_BATCH = "train.global_batch (sequences per step) and train.micro_batch"
_ACCUMULATION = (
    "train.global_batch and train.micro_batch: a step accumulates the gradients of global_batch / "
    "micro_batch micro-batches over all replicas"
)
_PRECISION = "train.precision ('fp32', 'bf16', 'fp64')"
_EVALUATION = "train.eval_every, train.eval_batches and data.eval_fraction"
_NAMES: Mapping[str, str] = {
    _BATCH: "batch_size train_batch_size global_batch_size",
    "train.micro_batch": (
        "per_device_train_batch_size local_batch_size micro_batch_size microbatch mbs"
    ),
    "train.global_batch": "gbs sequences",
    _ACCUMULATION: (
        "grad_accum grad_accum_steps gradient_accumulation accumulation_steps "
        "gradient_accumulation_steps accumulate_grad_batches grad_acc_steps "
        "batch_accumulation_per_replica num_microbatches micro_batches"
    ),
    _PRECISION: (
        "dtype mixed_precision amp bf16 torch_dtype fp16 fp8 half param_dtype compute_dtype"
    ),
    "optimizer.lr": "learning_rate max_lr base_lr peak_lr",
    "optimizer.min_lr": "lr_min min_learning_rate lr_end final_lr",
    "optimizer.warmup_steps": "warmup lr_warmup_iters num_warmup_steps",
    "optimizer.schedule": "lr_scheduler lr_schedule lr_decay_style",
    "optimizer.decay_steps": "lr_decay_iters lr_wsd_decay_iters num_decay_steps",
    "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "epsilon adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd decay",
    "optimizer.name": "optim optimizer type",
    "train.steps": "max_steps train_iters num_steps max_iters iterations",
    "train.steps (holdfast plan says how many epochs they are)": (
        "epochs num_epochs num_train_epochs"
    ),
    "train.seq_len": (
        "seq_length sequence_length context_length block_size max_length max_seq_length n_ctx"
    ),
    "model.max_seq_len": "max_position_embeddings n_positions",
    "train.clip_grad_norm": (
        "grad_clip max_norm clip_grad gradient_clipping max_grad_norm gradient_clip_val"
    ),
    "train.recompute": (
        "activation_checkpointing gradient_checkpointing ac_mode recompute_granularity remat"
    ),
    _EVALUATION: (
        "eval_interval eval_steps eval_iters val_check_interval validation_split val_split"
    ),
    "model.layers": "n_layer n_layers num_layers num_hidden_layers depth",
    "model.hidden": "d_model dim n_embd hidden_size width embed_dim",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.kv_heads": "n_kv_heads num_key_value_heads num_query_groups",
    "model.kv_heads or model.head_dim": "n_query_groups kv_channels",
    "model.intermediate": "d_ff ffn_dim ffn_hidden_size mlp_dim intermediate_size",
    "model.vocab": "vocab_size padded_vocab_size n_vocab",
    "model.tie_embeddings": "weight_tying tie_word_embeddings",
    "model.norm_eps": "rms_norm_eps layernorm_epsilon norm_epsilon",
    "model.rope_theta": "rope_base rotary_base",
    "model.init_std": "initializer_range init_method_std",
    "model.family": "model_type architecture arch",
    "parallel.tensor": (
        "tp tp_size tensor_parallel tensor_parallel_size tensor_parallel_degree "
        "tensor_model_parallel_size"
    ),
    "parallel.pipeline": (
        "pp pp_size pipeline_parallel pipeline_parallel_degree "
        "pipeline_parallel_size pipeline_model_parallel_size"
    ),
    "parallel.data": (
        "dp dp_size data_parallel replicas fsdp data_parallel_size data_parallel_degree "
        "world_size nproc num_gpus devices gpus"
    ),
    "parallel.virtual": "interleave virtual_pipeline num_chunks",
    "checkpoint.every": (
        "save_interval save_steps save_every interval checkpoint_interval save_freq"
    ),
    "checkpoint.keep": "save_total_limit keep_latest_k max_to_keep",
    "checkpoint.keep_best": "save_top_k load_best_model_at_end",
    "checkpoint.path": "save_dir checkpoint_dir folder",
    "holdfast train --out RUN": "output_dir out_dir run_dir",
    "holdfast train --resume PLACE": "resume_from resume_from_checkpoint",
    "log.every": "log_interval log_every log_freq logging_steps",
    "data.path": "dataset data_path train_data dataset_path files",
    "data.tokenizer": "tokenizer_path tokenizer_name tokenizer_model",
    "train.threads_per_rank": "threads num_threads omp_num_threads",
}
"""By what sets something here: the names that other programs give it."""
PEERS: Mapping[str, str] = {name: here for here, names in _NAMES.items() for name in names.split()}
"""By the name that another program gives a setting: what sets it here."""


def known_keys() -> tuple[str, ...]:
    """All keys of the configuration, as section.key, in the order of the file."""
    from holdfast.trainer.config.sections import RunConfig

    return tuple(
        f"{section.name}.{key.name}"
        for section in msgspec.structs.fields(RunConfig)
        for key in msgspec.structs.fields(section.type)
    )


def key_advice(section: str, name: str, own: Collection[str]) -> str:
    """The end of the message on an unknown key: what may have been meant, or what there is. Pure.

    Args:
        own: the keys of the section, those of its family or optimizer included.
    """
    near = difflib.get_close_matches(name, list(own), n=1, cutoff=_NEAR)
    if near:
        return f"; did you mean {section}.{near[0]}?"
    if section == "optimizer" and (rules := _rules_with(name)):
        return f"; it is a key of optimizer.name = {' or '.join(map(repr, rules))}"
    if found := meant_keys(name):
        return f"; did you mean {found}?"
    if peer := PEERS.get(_plain(name)):
        return f"; here it is {peer}"
    elsewhere = [key.partition(".")[2] for key in known_keys()]
    if near := difflib.get_close_matches(name, elsewhere, n=1, cutoff=_NEAR):
        return f"; did you mean {meant_keys(near[0])}?"
    return f"; [{section}] has {', '.join(own)}"


def _rules_with(name: str) -> list[str]:
    """The optimizers that have a key of this name of their own. Pure."""
    from holdfast.parallel.optimizer import OPTIMIZERS

    return [o for o, rule in OPTIMIZERS.items() if name in [key.name for key in rule.own_keys]]


def section_advice(name: str, sections: Collection[str]) -> str:
    """The end of the message on an unknown section. Pure."""
    near = difflib.get_close_matches(name, list(sections), n=1, cutoff=_NEAR)
    return f"; did you mean [{near[0]}]?" if near else f"; there are {', '.join(sections)}"


def lonely_advice(name: str) -> str:
    """The end of the message on a key outside any section. Pure."""
    if found := meant_keys(name):
        return f"; write it as {found}"
    if peer := PEERS.get(_plain(name)):
        return f"; here it is {peer}"
    return f"; write it as [{name}]"


def meant_keys(name: str) -> str:
    """The keys of this name in any section, for a person; empty if there is none. Pure."""
    return " or ".join(key for key in known_keys() if key.partition(".")[2] == name)


def _plain(name: str) -> str:
    """A name in small letters with underscores, as in PEERS."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|-", "_", name).lower()
