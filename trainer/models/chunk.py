"""The builder of one rank's model chunk, with weights that no layout changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from holdfast.parallel.context_parallel import ContextParallel
from holdfast.parallel.keyed_random import normal_box_, stream_key
from holdfast.parallel.layout import HeldRow, LayerSpec, ParameterSpec, held_rows
from holdfast.parallel.pipeline import Batch, Chunk, MicroBatchContext
from holdfast.parallel.precision import precision_of
from holdfast.parallel.tensor_parallel import TensorParallel
from holdfast.trainer.models.family import ChunkContext, family_of, layer_specs
from holdfast.trainer.models.section import ModelConfig

Weights = Literal["drawn", "unset", "none"]
"""The weights of a new chunk; see `build_chunk`."""
HostedExperts = Mapping[int, Collection[int]] | None
"""By layer, the experts that a rank has; None: those of its parts."""


class ModelChunk(Chunk):
    """A contiguous range of a model's layers, as modules of its family."""

    def __init__(
        self,
        model: ModelConfig,
        layers: range,
        specs: Sequence[LayerSpec],
        tp: TensorParallel,
        seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        compiles: bool,
        context_parallel: ContextParallel | None,
        experts: HostedExperts,
    ) -> None:
        """The arguments are those of `build_chunk`; `specs` has all layers of the model. Local."""
        super().__init__()
        self._specs, self._layers, self._parts = specs, layers, tp.own_parts
        self._experts, self._no_tokens = experts, torch.empty(0, model.hidden, dtype=dtype)
        shared = ChunkContext(
            tp,
            self.queue,
            seq_len,
            dtype,
            device,
            seed,
            compiles,
            context_parallel,
            self._experts_of,
        )
        build = family_of(model.family).modules(model, shared)
        self.layers = nn.ModuleDict(
            {specs[layer].name.replace(".", "_"): build(layer, specs[layer]) for layer in layers}
        )

    def forward(self, hidden: Tensor | None, context: MicroBatchContext) -> Tensor:
        count = len(context.slices.own)
        values = None if hidden is None else [_aligned(part) for part in hidden.chunk(count)]
        for layer, module in self.modules_by_layer():
            values = module(values, context)
            if context.watch is not None and layer < len(self._specs) - 1:
                context.watch(layer, values, context)
        assert values is not None
        if count == 1:
            return values[0]
        return torch.stack(values) if values[0].ndim == 0 else torch.cat(values)

    def logits(self, tokens: Tensor) -> Tensor:
        """The scores of the next token at every position, from a chunk that is a whole model.

        Args:
            tokens: int64[batch, seq].
        Returns:
            float[batch, seq, vocab]. Local.
        """
        if self._layers != range(len(self._specs)):
            raise ValueError("this chunk is a part of the model; build it from all layers")
        context = MicroBatchContext(0, 0, False, Batch(tokens, tokens))
        values: list[Tensor] | None = None
        *below, head = self.layers.values()
        for module in below:
            values = module(values, context)
        assert values is not None
        (logits,) = head.logits(values[0])  # pyrefly: ignore[not-callable]
        return logits.transpose(0, 1)

    def host(self, root: Tensor, context: MicroBatchContext) -> Tensor:
        value = root
        for module in self.layers.values():
            if (host := getattr(module, "host", None)) is not None:
                value = host(value, context)
        return value

    def no_tokens(self) -> Tensor:
        like = self._no_tokens  # without storage where the chunk was built without one
        return torch.empty(like.shape, dtype=like.dtype, device=next(self.parameters()).device)

    def rows(self) -> list[tuple[HeldRow, nn.Parameter]]:
        return [
            (row, parameter)
            for layer, module in self.modules_by_layer()
            for row, parameter in _with_parameters(self._held_rows(layer), module)
        ]

    def _held_rows(self, layer: int) -> list[HeldRow]:
        experts = None if self._experts is None else self._experts.get(layer, ())
        return held_rows(self._specs[layer], layer, self._parts, experts)

    def _experts_of(self, layer: int) -> list[int]:
        numbers = {row.spec.expert for row in self._held_rows(layer)}
        return sorted(number for number in numbers if number is not None)

    def modules_by_layer(self) -> list[tuple[int, nn.Module]]:
        return list(zip(self._layers, self.layers.values(), strict=True))


def _with_parameters(
    rows: Sequence[HeldRow], module: nn.Module
) -> Iterator[tuple[HeldRow, nn.Parameter]]:
    """The rows of a layer, with their parameters: one, or a list with one for each part."""
    parts: dict[str, list[int]] = {}
    for row in rows:
        known = parts.setdefault(row.spec.local, [])
        if row.part not in known:
            known.append(row.part)
        path, _, name = row.spec.local.rpartition(".")
        found = getattr(module.get_submodule(path), name)
        is_list = isinstance(found, nn.ParameterList)
        yield row, found[known.index(row.part)] if is_list else found


def _aligned(part: Tensor) -> Tensor:
    """A part of a tensor where it lies, or copied to a 64-byte boundary.

    Matrix products of operands elsewhere have other bits.
    """
    return part if part.data_ptr() % 64 == 0 else part.clone()


def build_chunk(
    model: ModelConfig,
    layers: range,
    specs: Sequence[LayerSpec],
    *,
    tensor_parallel: TensorParallel | None = None,
    dtype: torch.dtype,
    device: torch.device,
    seq_len: int,
    seed: int,
    weights: Weights = "drawn",
    compiles: bool = False,
    context_parallel: ContextParallel | None = None,
    experts: HostedExperts = None,
) -> ModelChunk:
    """A chunk with its initial weights. Local.

    Args:
        layers: indices into `specs`: 0 is the embedding, the last is the head.
        specs: all layers of the model, with their parameters by part.
        tensor_parallel: the split of layers; None: one rank has the whole of each.
        recompute: "none", "full" or "selective", for all transformer layers or for each of them.
        seed: the seed of the initial weights and of dropout.
        weights: "drawn" from `seed`; "unset", for a chunk that is filled from elsewhere; "none":
            parameters of their shapes without memory, which get one elsewhere.
        compiles: whether the family's regions are compiled.
        context_parallel: the split of sequences; None: sequences have one slice, or all are here.
        experts: see `HostedExperts`.
    """
    tp = tensor_parallel or TensorParallel(None, False)
    arguments = (model, layers, specs, tp, seq_len, dtype, device, seed, compiles)
    arguments = (*arguments, context_parallel, experts)
    if weights == "none":
        with torch.device("meta"):
            chunk = ModelChunk(*arguments)
        _take_out_of_memory(chunk, dtype, device)
        return chunk
    chunk = ModelChunk(*arguments)
    chunk.to(dtype=dtype)
    if weights == "drawn":
        initialize(chunk, seed)
    return chunk.to(device)


def _take_out_of_memory(chunk: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace parameters by ones of the same shape on `device`, all of one element."""
    for module in chunk.modules():
        for name, parameter in module.named_parameters(recurse=False):
            one = torch.empty((), dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(one.expand(parameter.shape)))


def build_whole_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seq_len: int,
    micro_batch: int,
    seed: int,
    vocab_chunk: int = 0,
    shards: int = 1,
    strips: int = 1,
    weights: Weights = "drawn",
    compiles: bool = False,
) -> ModelChunk:
    """All layers as one chunk of one rank. Local.

    Arguments as of `build_chunk`, `layer_specs` and `TensorParallel`.
    """
    specs = layer_specs(
        model,
        tensor=1,
        sequence_parallel=False,
        seq_len=seq_len,
        micro_batch=micro_batch,
        precision=precision_of(dtype).name,
        recompute="none",
        vocab_chunk=vocab_chunk,
        shards=shards,
    )
    return build_chunk(
        model,
        range(len(specs)),
        specs,
        tensor_parallel=TensorParallel(None, False, shards, strips),
        dtype=dtype,
        device=device,
        seq_len=seq_len,
        seed=seed,
        weights=weights,
        compiles=compiles,
    )


def initialize(chunk: Chunk, seed: int) -> None:
    """Draw all parameters: element i of a logical tensor is a function of (seed, name, i)."""
    for (*_, spec), parameter in chunk.rows():
        segment = parameter.data[spec.local_row : spec.local_row + spec.rows]
        segment.copy_(initial_values(spec, seed, parameter.dtype))


def initial_values(spec: ParameterSpec, seed: int, dtype: torch.dtype) -> Tensor:
    """The initial values of one segment: its box of the logical tensor, drawn in float32."""
    shape, initial = spec.box.shape, spec.initial
    match initial.kind:
        case "constant":
            return torch.full(shape, initial.value, dtype=dtype)
        case "normal":
            values = torch.empty(shape, dtype=torch.float32)
            key = stream_key(seed, "initial", spec.name)
            row, column = spec.box.start
            columns, std = spec.shape[1], initial.value
            normal_box_(values, key, row=row, column=column, total_columns=columns, std=std)
            return values.to(dtype)
        case unknown:
            assert_never(unknown)
