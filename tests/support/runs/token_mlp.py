"""A family that exists in tests only: each token passes through MLPs, and predicts the next one.

It is unlike Llama where that matters: a section with a key of its own, LayerNorm with a bias, no
attention, no rotary embedding, ordinary autograd gradients. `registered` has its registry line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import Store

from holdfast.parallel.layout import Box, Initial, LayerSpec, ParameterSpec
from holdfast.parallel.pipeline import MicroBatchContext
from holdfast.trainer.models import family
from holdfast.trainer.models.family import ChunkContext, Family
from holdfast.trainer.models.section import ModelConfig


class TokenMLPConfig(ModelConfig, frozen=True, kw_only=True):
    """`ModelConfig` with a key that no other family has."""

    expansion: int = 2
    """Inner features of a layer / hidden."""


def _row(name: str, shape: tuple[int, ...], local: str, *, constant: float | None = None) -> Any:
    initial = Initial("normal", 0.02) if constant is None else Initial("constant", constant)
    whole = Box((0,) * len(shape), shape)
    return ParameterSpec(name, shape, whole, local, 0, initial, len(shape) > 1, (0,))


def layer_specs(model: TokenMLPConfig, **layout: Any) -> tuple[LayerSpec, ...]:
    hidden, inner, vocab = model.hidden, model.hidden * model.expansion, model.vocab
    tokens = layout["seq_len"] * layout["micro_batch"]
    bytes_of_hidden = 4 * tokens * hidden

    def layer(name: str, rows: tuple[Any, ...], weights: int) -> LayerSpec:
        flops = 2.0 * tokens * weights
        return LayerSpec(name, (rows,), flops, 3 * bytes_of_hidden, bytes_of_hidden)

    return (
        layer("embedding", (_row("embed.weight", (vocab, hidden), "weight"),), 0),
        *(
            layer(
                f"block.{i}",
                (
                    _row(f"layers.{i}.norm.weight", (hidden,), "norm.weight", constant=1.0),
                    _row(f"layers.{i}.norm.bias", (hidden,), "norm.bias", constant=0.0),
                    _row(f"layers.{i}.up.weight", (inner, hidden), "up.weight"),
                    _row(f"layers.{i}.down.weight", (hidden, inner), "down.weight"),
                ),
                2 * hidden * inner,
            )
            for i in range(model.layers)
        ),
        layer("head", (_row("head.weight", (vocab, hidden), "weight"),), hidden * vocab),
    )


class Embedding(nn.Module):
    def __init__(self, model: TokenMLPConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.vocab, model.hidden))

    def forward(self, values: None, context: MicroBatchContext) -> list[Tensor]:
        assert context.batch is not None
        return [F.embedding(context.batch.tokens.t(), self.weight)]


class Layer(nn.Module):
    def __init__(self, model: TokenMLPConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model.hidden)
        self.up = nn.Linear(model.hidden, model.hidden * model.expansion, bias=False)
        self.down = nn.Linear(model.hidden * model.expansion, model.hidden, bias=False)

    def forward(self, values: list[Tensor], context: MicroBatchContext) -> list[Tensor]:
        return [value + self.down(F.gelu(self.up(self.norm(value)))) for value in values]


class Head(nn.Module):
    def __init__(self, model: TokenMLPConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.vocab, model.hidden))

    def logits(self, value: Tensor) -> list[Tensor]:
        return [F.linear(value, self.weight)]

    def forward(self, values: list[Tensor], context: MicroBatchContext) -> list[Tensor]:
        assert context.batch is not None
        (value,) = values
        logits = self.logits(value)[0].double().flatten(0, 1)
        return [F.cross_entropy(logits, context.batch.targets.t().flatten(), reduction="sum")]


def modules(model: TokenMLPConfig, context: ChunkContext) -> Callable[[int, LayerSpec], nn.Module]:
    def build(layer: int, spec: LayerSpec) -> nn.Module:
        if spec.name == "embedding":
            return Embedding(model)
        if spec.name == "head":
            return Head(model)
        return Layer(model)

    return build


def problems(model: TokenMLPConfig, parts: int, key: str) -> Iterator[str]:
    if model.expansion < 1:
        yield f"model.expansion = {model.expansion}: must be 1 or more"
    if parts > 1:
        yield f"{key} = {parts}: token-mlp has no tensor-parallel form; set it to 1"


def config_json(model: TokenMLPConfig, seq_len: int, dtype: str) -> Mapping[str, Any]:
    return {"model_type": "token-mlp", "hidden_size": model.hidden, "dtype": dtype}


def differences(model: TokenMLPConfig, described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if described.get("hidden_size", model.hidden) != model.hidden:
        line = f"model.hidden = {model.hidden} (its config.json has {described['hidden_size']})"
        yield "model.hidden", line


def tiny(model: TokenMLPConfig, tensor: int, layers: int, divisor: int) -> TokenMLPConfig:
    return msgspec.structs.replace(model, layers=layers, hidden=8, vocab=12, max_seq_len=8)


FAMILY = Family(
    section=TokenMLPConfig,
    problems=problems,
    layer_specs=layer_specs,
    modules=modules,
    config_json=config_json,
    differences=differences,
    tiny=tiny,
    tensor_share=lambda model, tensor: msgspec.structs.replace(model, layers=1),
)


@contextmanager
def registered() -> Iterator[None]:
    """The family can be named by configurations of this process."""
    with mock.patch.dict(family.FAMILIES, {"token-mlp": "support.runs.token_mlp"}):
        yield


def train_steps(rank: int, world_size: int, store: Store, **arguments: Any) -> dict[str, Any]:
    """`small_runs.train_steps` in a process that knows the family."""
    from support.runs import small_runs

    with registered():
        torch.manual_seed(rank)  # the weights do not depend on it
        return small_runs.train_steps(rank, world_size, store, **arguments)


def train_in(rank: int, world_size: int, store: Store, **arguments: Any) -> None:
    """`small_runs.train_in` in a process that knows the family."""
    from support.runs import small_runs

    with registered():
        small_runs.train_in(rank, world_size, store, **arguments)
