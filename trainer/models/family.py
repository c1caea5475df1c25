"""The definition of a model family, and the registry of families. Needs no torch.

A family is one folder beside this file: its configuration section and rules, the table of its
layers (parameters under their Hugging Face names, shapes, shards, operations), its modules, its
`config.json`. A new one is that folder and one line of `FAMILIES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from holdfast.parallel.layout import LayerSpec
from holdfast.trainer.models.section import ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from holdfast.parallel.context_parallel import ContextParallel
    from holdfast.parallel.pipeline import WeightGradientQueue
    from holdfast.parallel.tensor_parallel import TensorParallel
    from holdfast.trainer.models.compilation import Region

M = TypeVar("M", bound=ModelConfig)
M_contra = TypeVar("M_contra", bound=ModelConfig, contravariant=True)

FAMILIES: Mapping[str, str] = {
    "deepseek_v3": "holdfast.trainer.models.deepseek_v3",
    "gpt2": "holdfast.trainer.models.gpt2",
    "llama": "holdfast.trainer.models.llama",
    "mistral": "holdfast.trainer.models.mistral",
    "mixtral": "holdfast.trainer.models.mixtral",
    "qwen2": "holdfast.trainer.models.qwen2",
    "qwen3": "holdfast.trainer.models.qwen3",
    "qwen3_moe": "holdfast.trainer.models.qwen3_moe",
}
"""By the value of `model.family`: the module that has the family as `FAMILY`."""


@dataclass(frozen=True, slots=True)
class ChunkContext:
    """The values that the modules of one model chunk share."""

    tensor_parallel: TensorParallel
    queue: WeightGradientQueue
    """Takes the weight gradients of the chunk's linear layers."""
    seq_len: int
    dtype: torch.dtype
    """The dtype of the parameters and hidden states."""
    device: torch.device
    seed: int
    """The seed of dropout."""
    compiles: bool = False
    """Whether the family's regions are compiled."""
    context_parallel: ContextParallel | None = None
    """The split of sequences; None: sequences have one slice."""
    experts_of: Callable[[int], Sequence[int]] = lambda layer: ()
    """The experts of a layer that the rank has."""


@dataclass(frozen=True, slots=True)
class RegionSizes:
    """The sizes that a family's regions have on every rank of a run."""

    tensor: int
    """The parts of a layer: the tensor-parallel degree, or a multiple of it."""
    rows: int
    """The positions that a norm has: `tokens`, or a part's with sequence parallelism."""
    tokens: int
    """The tokens of a slice of a sequence: those that are computed as one."""
    seq_len: int
    micro_batch: int
    dtype: torch.dtype
    device: torch.device


class LayerTable(Protocol[M_contra]):
    """The layers of a model, from the embedding to the head."""

    def __call__(
        self,
        model: M_contra,
        *,
        tensor: int,
        sequence_parallel: bool,
        seq_len: int,
        micro_batch: int,
        precision: str,
        recompute: str | Sequence[str],
        vocab_chunk: int = 0,
        shards: int = 1,
    ) -> tuple[LayerSpec, ...]:
        """The embedding, `model.layers` transformer layers, the head: rows and costs. Pure.

        Args:
            tensor: the tensor-parallel degree; costs are those of one rank.
            sequence_parallel: whether hidden states are split over the tensor group.
            precision: a name of `holdfast.parallel.precision.PRECISIONS`.
            recompute: "none", "full" or "selective", of all transformer layers or of each.
            vocab_chunk: the vocabulary entries of a part whose logits are in memory at once; 0:
                all. The head's row has it; 0 there: it computes them as one.
            shards: the parts of each layer, with a table of rows each; 1: one for each rank.
        """
        ...


@dataclass(frozen=True, slots=True)
class TrainingOnly(Generic[M]):
    """The layers of a family that predict further tokens in training, and are left out then on."""

    count_losses: Callable[[M], int]
    """(section) -> the losses of a slice beside that of the next tokens."""
    without: Callable[[M], M]
    """(section) -> the section without them."""
    has_weight: Callable[[M, str], bool]
    """(section, name of a weight) -> whether it is one of theirs, also where the section leaves
    them out."""


@dataclass(frozen=True, slots=True)
class Family(Generic[M]):
    """A model family. Only `modules` and `compiled_regions` need torch.

    It has a field for each thing that families do their own way.
    """

    section: type[M]
    """The `[model]` section: `ModelConfig`, or a struct derived from it with more keys."""
    problems: Callable[[M, int, str], Iterator[str]]
    """(section, parts of a layer, the key that has their number) -> the broken rules, one line
    each: key, value, advice."""
    layer_specs: LayerTable[M]
    """The table of layers. Rows have Hugging Face's names, so checkpoints need no renaming."""
    modules: Callable[[M, ChunkContext], Callable[[int, LayerSpec], nn.Module]]
    """Returns the builder of a chunk's modules: (layer index, row of the table) -> module.

    Module `forward(values, context)` takes and gives float[tokens (/ tensor), micro_batch, hidden]
    of each of the rank's slices (`context.slices`; usually one, the whole sequence). The embedding
    takes None; the head gives the sum of the token losses of each slice, in which negative targets
    do not count, and has `logits(value)`. In training it gives those of further tokens behind it,
    if there are any (`training_only`). Attention does not cross the ends of
    `context.batch.documents`. Parameters have the local names of the table: one, or an
    `nn.ParameterList` with that of each part that the rank has."""
    config_json: Callable[[M, int, str], Mapping[str, Any]]
    """(section, sequence length, torch's name of the dtype) -> Hugging Face's `config.json`."""
    differences: Callable[[M, Mapping[str, Any]], Iterator[tuple[str, str]]]
    """The differences between a section and a `config.json`, key and line of each: what the model
    here computes otherwise. A key of `config.json` that [model] lacks has `config.json:` before
    it."""
    tiny: Callable[[M, int, int, int], M]
    """(section, parts, layers, divisor of heads, a multiple of parts) -> a section of small sizes
    that divide as before."""
    tensor_share: Callable[[M, int], M]
    """(section, tensor degree) -> a one-layer section of the size of one tensor rank's part."""
    section_of: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """A `config.json` -> the keys of [model] that it gives, some of them None. It raises ValueError
    for what no key says. None: models are not taken from Hugging Face folders."""
    experts: Callable[[M], int] = lambda model: 0
    """(section) -> the experts of a layer; 0: there are none."""
    windows: Callable[[M], Sequence[int]] = lambda model: ()
    """(section) -> by layer, the keys that a query sees, itself included; 0: all. Empty: all."""
    clips_heads: Callable[[M], bool] = lambda model: False
    """(section) -> whether attention notes its logits and rows of the table say which of them make
    the queries and keys of each head, so that QK-clip can scale these."""
    training_only: TrainingOnly[M] | None = None
    """The layers that serve training alone; None: there are none."""
    compiled_regions: Callable[[M, RegionSizes], Iterator[Region]] | None = None
    """(section, sizes) -> the functions that `train.compile` compiles, for each shape that they
    have on some rank. None: there are none."""


def family_of(name: str) -> Family[Any]:
    """The family of a registered name."""
    return importlib.import_module(FAMILIES[name]).FAMILY


def experts_of(model: ModelConfig) -> int:
    """The experts of a layer; 0: there are none. Pure."""
    return family_of(model.family).experts(model)


def windows_of(model: ModelConfig) -> Sequence[int]:
    """By layer, the keys that a query sees, itself included; 0: all. Empty: all. Pure."""
    return family_of(model.family).windows(model)


def clips_heads(model: ModelConfig) -> bool:
    """Whether QK-clip can scale the queries and keys of heads. Pure."""
    return family_of(model.family).clips_heads(model)


def further_losses_of(model: ModelConfig) -> int:
    """The losses of a slice beside that of the next tokens, in training. Pure."""
    found = family_of(model.family).training_only
    return 0 if found is None else found.count_losses(model)


def in_use(model: ModelConfig) -> ModelConfig:
    """A model without the layers that serve training alone. Pure."""
    found = family_of(model.family).training_only
    return model if found is None else found.without(model)


def serves_training_alone(model: ModelConfig, name: str) -> bool:
    """Whether a weight is of a layer that serves training alone, which a model of these sizes may
    have. Pure."""
    found = family_of(model.family).training_only
    return found is not None and found.has_weight(model, name)


def layer_specs(
    model: ModelConfig,
    *,
    tensor: int,
    sequence_parallel: bool,
    seq_len: int,
    micro_batch: int,
    precision: str,
    recompute: str | Sequence[str],
    vocab_chunk: int = 0,
    shards: int = 1,
) -> tuple[LayerSpec, ...]:
    """The layers of a model, by the table of its family; see `LayerTable`. Pure."""
    return family_of(model.family).layer_specs(
        model,
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        seq_len=seq_len,
        micro_batch=micro_batch,
        precision=precision,
        recompute=recompute,
        vocab_chunk=vocab_chunk,
        shards=shards,
    )
