"""The rules between the keys of a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from holdfast.parallel.errors import shown
from holdfast.trainer.models.decoder.section import (
    DecoderConfig,
    Design,
    ExpertDesign,
    LatentDesign,
    LayeredWindowConfig,
    LearnedPositionsConfig,
    RopeScaling,
)
from holdfast.trainer.models.section import ModelConfig

_FACTORS: Final = ("linear", "proportional", "llama3", "yarn")
"""The types of scaled rotary embedding, all of which have a factor."""
_LENGTHS: Final = ("llama3", "yarn")
"""Those that depend on the length of sequences before."""


def problems(model: DecoderConfig, design: Design, parts: int, key: str) -> Iterator[str]:
    """One line per broken rule: the key, its value, what to change. Pure.

    Args:
        parts: the parts of each layer.
        key: the key that has their number.
    """
    if min(model.heads, model.kv_heads, model.hidden) < 1:
        return
    if isinstance(model, LearnedPositionsConfig):
        yield from _learned_problems(model, parts, key)
    else:
        yield from _head_problems(model)
        yield from _rotary_problems(model.rope_scaling)
    if isinstance(model, LayeredWindowConfig) and model.max_window_layers > model.layers:
        yield (
            f"model.max_window_layers = {model.max_window_layers} exceeds model.layers = "
            f"{model.layers}: no layer would have a window; lower it"
        )
    if design.latent is not None:
        yield from _latent_problems(model, design.latent)
    if design.experts is not None:
        yield from _expert_problems(model, design.experts, max(parts, 1), f"{key} = {parts}")
    if design.multi_token is not None:
        yield from _multi_token_problems(model, design.multi_token.layers)
    if parts >= 1:
        yield from _part_problems(model, parts, f"{key} = {parts}")


def _head_problems(model: ModelConfig) -> Iterator[str]:
    if not model.head_dim and model.hidden % model.heads:
        yield (
            f"model.hidden = {model.hidden} is not divisible by model.heads = {model.heads}; "
            "change one of them, or set model.head_dim"
        )
    elif model.dim_per_head % 2:
        yield (
            f"the head dimension is {model.dim_per_head}, and rotary embedding needs an even one; "
            "change model.hidden, model.heads or model.head_dim"
        )
    if model.heads % model.kv_heads:
        yield (
            f"model.heads = {model.heads} is not divisible by model.kv_heads = {model.kv_heads}; "
            "each key and value head serves the same number of query heads"
        )


def _learned_problems(model: LearnedPositionsConfig, parts: int, key: str) -> Iterator[str]:
    family = f"model.family = {model.family!r}"
    if model.hidden % model.heads:
        yield (
            f"model.hidden = {model.hidden} is not divisible by model.heads = {model.heads}; "
            "change one of them"
        )
    elif model.heads * model.dim_per_head != model.hidden:
        yield (
            f"model.head_dim = {model.head_dim}: with {family} it is model.hidden / model.heads = "
            f"{model.hidden // model.heads}; remove it"
        )
    if model.kv_heads != model.heads:
        yield (
            f"model.kv_heads = {model.kv_heads}: with {family} each of the {model.heads} heads has "
            "keys and values of its own; remove it"
        )
    plain = DecoderConfig(family="", layers=1, hidden=1)
    for name in ("rope_theta", "rope_scaling"):
        if (value := getattr(model, name)) != getattr(plain, name):
            yield (
                f"model.{name} = {shown(msgspec.to_builtins(value))}: {family} learns its "
                "positions, and rotates nothing; remove it"
            )
    if parts > model.max_seq_len:
        yield f"{key} = {parts} exceeds model.max_seq_len = {model.max_seq_len}; lower it"


def _rotary_problems(scaling: RopeScaling) -> Iterator[str]:
    kind = scaling.rope_type
    said = f"model.rope_scaling with rope_type = {kind!r}"
    limits = {
        "factor": (1.0, 1e6) if kind in _FACTORS else (1.0, 1.0),
        "original_max_position_embeddings": (1, 2**31) if kind in _LENGTHS else (0, 2**31),
        "partial_rotary_factor": (0.0, 1.0),
        "low_freq_factor": (1e-6, 1e6),
        "high_freq_factor": (1e-6, 1e6),
        "beta_fast": (1e-6, 1e6),
        "beta_slow": (1e-6, 1e6),
        "attention_factor": (0.0, 1e6),
        "mscale": (0.0, 1e6),
        "mscale_all_dim": (0.0, 1e6),
    }
    for name, (least, most) in limits.items():
        value = getattr(scaling, name)
        if not least <= value <= most:  # nan too
            yield f"{said}: {name} = {shown(value)}: must be from {least} to {most}"
    if kind == "llama3" and not scaling.low_freq_factor < scaling.high_freq_factor:
        yield (
            f"{said}: low_freq_factor = {scaling.low_freq_factor} must be less than "
            f"high_freq_factor = {scaling.high_freq_factor}"
        )


def _latent_problems(model: DecoderConfig, latent: LatentDesign) -> Iterator[str]:
    if model.head_dim != latent.key:
        yield (
            f"model.head_dim = {model.head_dim} is not the sum of model.plain_head_dim = "
            f"{latent.plain} and model.rope_head_dim = {latent.turning}; leave it out"
        )
    if latent.plain % 2 or latent.turning % 2:
        yield (
            f"model.plain_head_dim = {latent.plain} and model.rope_head_dim = {latent.turning}: "
            "rotary embedding needs even numbers; change the odd one"
        )
    if latent.value > latent.key:
        yield (
            f"model.value_head_dim = {latent.value} exceeds the {latent.key} elements of a key; "
            "lower it"
        )
    if model.kv_heads != model.heads:
        yield (
            f"model.kv_heads = {model.kv_heads} differs from model.heads = {model.heads}: with "
            "latent attention every head has keys and values; leave it out"
        )


def _expert_problems(
    model: DecoderConfig, experts: ExpertDesign, parts: int, said: str
) -> Iterator[str]:
    count, per_token, router = experts.count, experts.per_token, experts.router
    if per_token > count:
        yield (f"model.experts_per_token = {per_token} exceeds model.experts = {count}; lower it")
    if count % parts:
        yield (
            f"model.experts = {count} is not divisible by {said}; every rank of a tensor "
            "group has as many experts"
        )
    if count % router.groups:
        yield (
            f"model.experts = {count} is not divisible by model.expert_groups = "
            f"{router.groups}; groups have equal numbers of experts"
        )
    elif router.group_limit > router.groups:
        yield (
            f"model.groups_per_token = {router.group_limit} exceeds model.expert_groups = "
            f"{router.groups}; lower it"
        )
    elif 0 < router.group_limit * (count // router.groups) < per_token:
        yield (
            f"model.experts_per_token = {per_token} exceeds the experts of model.groups_per_token "
            f"= {router.group_limit} groups, which have {count // router.groups} each; lower it"
        )
    if experts.shared and experts.shared < parts:
        yield f"{said} exceeds the {experts.shared} features of the shared expert; lower it"
    dense = experts.dense_layers
    if list(dense) != sorted({layer for layer in dense if 0 <= layer < model.layers}):
        yield (
            f"model.dense_layers = {shown(list(dense))}: give different layers from 0 to "
            f"{model.layers - 1}, in ascending order"
        )
    elif experts.only_first_dense and dense != tuple(range(len(dense))):
        yield (
            f"model.dense_layers = {shown(list(dense))}: in model.family = {model.family!r} these "
            f"are the first layers; give {shown(list(range(len(dense))))}"
        )


def _multi_token_problems(model: DecoderConfig, count: int) -> Iterator[str]:
    if count > 1:
        yield (
            f"model.multi_token_layers = {count}: one layer may predict a further token; use 1 or 0"
        )
    if model.tie_embeddings:
        yield (
            f"model.multi_token_layers = {count} with model.tie_embeddings = true: the layer that "
            "predicts a further token uses the embedding beside the head, which has a weight of "
            "its own then; set one of them to another value"
        )


def _part_problems(model: ModelConfig, parts: int, said: str) -> Iterator[str]:
    if model.heads % parts:
        taker = "tensor rank" if said.startswith("parallel.") else "shard"
        yield (
            f"model.heads = {model.heads} is not divisible by {said}; every {taker} takes the same "
            "number of heads"
        )
    elif model.kv_heads % parts and parts % model.kv_heads:
        yield (
            f"model.kv_heads = {model.kv_heads} and {said}: one must divide the other, so that key "
            "and value heads are split or shared evenly"
        )
    if parts > min(model.vocab, model.intermediate):
        yield f"{said} exceeds model.vocab or model.intermediate; lower it"
