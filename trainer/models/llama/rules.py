"""The rules between the keys of a Llama model."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.trainer.models.section import ModelConfig


def problems(model: ModelConfig, parts: int, key: str) -> Iterator[str]:
    """One line per broken rule: the key, its value, what to change. Pure.

    Args:
        parts: the parts of each layer.
        key: the key that has their number.
    """
    if min(model.heads, model.kv_heads, model.hidden) < 1:
        return
    yield from _head_problems(model)
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
