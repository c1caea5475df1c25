"""The writer of Megatron-Core's older folders: one file a rank (mp_rank_XX, mp_rank_XX_YYY).

The format `megatron` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import LogicalTensor, Output
from holdfast.checkpoint.convert.formats.megatron.further import with_further
from holdfast.checkpoint.convert.formats.megatron.optimizer_order import (
    HALVES,
    Parameter,
    is_parameter,
    order_of,
)
from holdfast.checkpoint.convert.formats.megatron.torch_dist import read
from holdfast.checkpoint.convert.formats.megatron.writing import (
    NAME as RULES,
    beside_tensors,
    choose_tensors,
    find_arguments,
    optimizer_step,
    parameter_groups,
)
from holdfast.checkpoint.convert.rules import (
    Joined,
    builtin_rules,
    cut,
    map_back,
)
from holdfast.checkpoint.convert.sources import (
    MEGATRON_TRACKER,
    Catalog,
    WriteOptions,
    files_for,
)
from holdfast.checkpoint.convert.writing import (
    TORCH_FILE_DTYPES,
    TensorToCome,
    TorchFolder,
    write_files,
)
from holdfast.checkpoint.format import STEP, WEIGHT
from holdfast.checkpoint.stores import write_synced
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.optimizer import MASTER

__all__ = ["NAME", "plan", "read"]
NAME = "megatron-legacy"
_WHERE = f"--to {NAME}"
_FORMS = {1: "te", 0: "local"}
"""The forms of Megatron's rules, by the value `transformer_engine`."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_LINEAR = re.compile(
    r"(.*(?:\.linear_(?:qkv|fc1|fc2|(?:q_|kv_)?(?:down_|up_)?proj)|\.eh_proj))\.weight"
)
_ATTENTION = re.compile(r"(.*\.)linear_(?:qkv|kv_up_proj)\.weight")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def plan(catalog: Catalog, options: WriteOptions) -> Output:
    """Plan one file per rank of the layout in `tensor`, `pipeline` and `virtual` (1 by default).

    The output is an iteration with the optimizer's state if the source has moments of every weight,
    else a release.

    Raises:
        CheckpointError: Megatron's GPT model lacks a tensor, layers differ, only some weights have
            moments, or a tensor cannot be cut into so many equal parts.
        ConfigError: a size of the model is unknown, or a value is out of its range.
    """
    layout = _layout(options.values)
    book = builtin_rules(RULES)
    chosen = choose_tensors(catalog, options, book, all_copies=False)
    typed, weights = chosen.tensors, chosen.weights()
    arguments, values = find_arguments(catalog, book, options.values, weights, shards=layout.tensor)
    tied = "lm_head.weight" not in weights
    told = {**arguments, **layout.arguments(), "untie_embeddings_and_output_weights": not tied}
    joined = map_back(book, typed, values, _WHERE, form=layout.form, shards=layout.tensor)
    joined = with_further(joined, told)
    model = {(one.kind, one.weight): one for one in joined}
    trained = bool(chosen.kinds)
    common = beside_tensors(catalog, told, trained=trained)
    keeping = _keeping(catalog, told, chosen.kinds, layout.form) if trained else None
    chunks = _chunks(model, layout.pipeline, layout.virtual, tied=tied)
    root = f"iter_{catalog.step:07d}" if trained else "release"
    folder = TorchFolder()
    for index in range(layout.tensor):
        for stage, members in enumerate(chunks):
            rank = _Rank(model, index, layout.tensor)
            content = {**common, **_chunk_states(rank, members, kernels=layout.form == "te")}
            if keeping is not None:
                parameters = [one for names in members for one in names if is_parameter(one[1])]
                content["optimizer"] = _optimizer(rank, parameters, keeping)
            name = f"mp_rank_{index:02d}" + (f"_{stage:03d}" if layout.pipeline > 1 else "")
            folder.add(f"{root}/{name}/model_optim_rng.pt", content, rank.tensors)
    files = files_for(catalog, typed)

    def finish(target: Path, checksums: Sequence[int]) -> None:
        folder.write(target, checksums)
        write_files(target / root, files)
        tracked = str(catalog.step) if trained else root
        write_synced(target / MEGATRON_TRACKER, tracked.encode())

    return Output(folder.sizes, folder.units, finish, typed, "crc32")


@dataclass(frozen=True, slots=True)
class _RankGrid:
    """The numbers of ranks to write for, and the form of their layers."""

    tensor: int
    pipeline: int
    virtual: int
    """The number of model chunks of each stage."""
    form: str

    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments for this grid."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual if self.virtual > 1 else None,
            "transformer_impl": "transformer_engine" if self.form == "te" else "local",
            "use_distributed_optimizer": False,
        }


def _layout(values: Mapping[str, int]) -> _RankGrid:
    tensor, pipeline, virtual = (_count(values, name) for name in ("tensor", "pipeline", "virtual"))
    if virtual > 1 and pipeline == 1:
        raise ConfigError(f"{_WHERE}: --value virtual={virtual} needs --value pipeline=2 or more")
    form = _FORMS.get(values.get("transformer_engine", 1))
    if form is None:
        raise ConfigError(
            f"{_WHERE}: --value transformer_engine is 1 (its layers) or 0 (local ones)"
        )
    return _RankGrid(tensor, pipeline, virtual, form)


def _count(values: Mapping[str, int], name: str) -> int:
    """The number of ranks, or of model chunks, that a value gives."""
    count = values.get(name, 1)
    if count < 1:
        raise ConfigError(f"{_WHERE}: --value {name}={count}: give a number, 1 or more")
    return count


_Model = Mapping[tuple[str, str], Joined]
"""The whole tensors of a model and its optimizer, by kind and by the parameter's name across all
stages."""
_Chunk = list[tuple[str, str]]
"""The parameters of a model chunk in order: (name in the chunk, name across all stages)."""


def _chunks(model: _Model, pipeline: int, virtual: int, *, tied: bool) -> list[list[_Chunk]]:
    """The parameters of each chunk of each pipeline stage; layers count from 0 in each chunk."""
    names = [key for kind, key in model if kind == WEIGHT]
    numbers = {int(found[1]) for name in names if (found := _LAYER.fullmatch(name))}
    layers, shares = max(numbers, default=-1) + 1, pipeline * virtual
    if layers % shares or layers != len(numbers):
        by = f"{pipeline} pipeline stages" + (f" of {virtual} chunks" if virtual > 1 else "")
        raise CheckpointError(
            f"{_WHERE}: {len(numbers)} layers, numbered up to {layers - 1}, cannot be shared "
            f"equally by {by}; "
            f"choose another --value {'virtual' if layers % pipeline == 0 else 'pipeline'}"
        )
    # The order is that of a micro-batch: the first chunk of each stage, then the second of each.
    each = layers // shares
    further = any(name.startswith("mtp.") for name in names)
    passed: list[_Chunk] = [[] for _ in range(shares)]
    for name in names:
        found = _LAYER.fullmatch(name)
        if found is not None:
            number = int(found[1])
            passed[number // each].append((f"decoder.layers.{number % each}.{found[2]}", name))
        else:
            passed[0 if name.startswith("embedding.") else -1].append((name, name))
        if name == _EMBEDDING and further and pipeline > 1:
            # The last stage embeds the tokens for the layers that predict further ones.
            passed[-1].append((name, name))
        if name == _EMBEDDING and tied and pipeline > 1:
            # The last stage computes its logits with a copy, which is trained like the first
            # stage's.
            passed[-1].append((_OUTPUT, name))
    for chunk in passed:
        chunk.sort(key=lambda member: order_of(member[0]))
    return [passed[stage::pipeline] for stage in range(pipeline)]


class _Rank:
    """Collects the tensors of one rank's file."""

    def __init__(self, model: _Model, index: int, count: int) -> None:
        self.model = model
        self.tensors: list[tuple[TensorToCome, LogicalTensor]] = []
        self._index, self._count = index, count

    def add(self, kind: str, key: str) -> TensorToCome:
        """Add this rank's shard of a tensor."""
        joined = self.model[kind, key]
        if joined.dtype not in TORCH_FILE_DTYPES:
            raise CheckpointError(f"{key} has dtype {joined.dtype}, which cannot be written so")
        shard = cut(joined, self._index, self._count, _WHERE)
        come = TensorToCome(len(self.tensors), joined.dtype, shard.shape)
        self.tensors.append((come, shard))
        return come


def _chunk_states(rank: _Rank, chunks: Sequence[_Chunk], *, kernels: bool) -> dict[str, Any]:
    """The state dicts of a rank's model chunks, by Megatron's names for them."""
    found = {}
    for number, members in enumerate(chunks):
        state: dict[str, Any] = {name: rank.add(WEIGHT, key) for name, key in members}
        if kernels:
            state |= dict.fromkeys(_kernel_states(name for name, _ in members))
        found["model" if len(chunks) == 1 else f"model{number}"] = state
    return found


@dataclass(frozen=True, slots=True)
class _Keeping:
    """The form in which the optimizer's state is kept."""

    kinds: tuple[str, ...]
    """The kinds of the states of each parameter."""
    groups: list[dict[str, Any]]
    """The groups with weight decay and without."""
    query_key_norms: bool
    """Whether the norms of queries and keys have weight decay."""
    states: Mapping[str, Any]
    """The values of each parameter that are not tensors."""


def _keeping(
    catalog: Catalog, arguments: Mapping[str, Any], kinds: tuple[str, ...], form: str
) -> _Keeping:
    # Transformer Engine's Adam counts steps by group, and accepts only tensors for each parameter.
    steps = {} if form == "te" else {STEP: optimizer_step(catalog)}
    norms = bool(arguments.get("apply_wd_to_qk_layernorm"))
    return _Keeping(kinds, parameter_groups(catalog), norms, steps)


def _optimizer(rank: _Rank, members: _Chunk, keeping: _Keeping) -> dict[str, Any]:
    """The state of Megatron's optimizer: of 32-bit weights, or of 16-bit ones if any."""
    states: dict[int, Any] = {}
    groups, masters = [], []
    for group in keeping.groups:
        first, copies = len(states), []
        for _, key in members:
            joined = rank.model[WEIGHT, key]
            parameter = Parameter(key, joined.dtype, joined.tensor.shape)
            if parameter.decays(query_key_norms=keeping.query_key_norms) != bool(group["wd_mult"]):
                continue
            tensors = {kind: rank.add(kind, key) for kind in keeping.kinds}
            states[len(states)] = {**keeping.states, **tensors}
            if joined.dtype in HALVES:
                copies.append(rank.add(MASTER, key))
        groups.append({**group, "params": list(range(first, len(states)))})
        masters.append(copies)
    kept = {"state": states, "param_groups": groups}
    halves = any(one.dtype in HALVES for (kind, _), one in rank.model.items() if kind == WEIGHT)
    return {"optimizer": kept, "fp32_from_fp16_params": masters} if halves else kept


def _kernel_states(names: Iterable[str]) -> Iterator[str]:
    """The keys of the kernels' state in layers, which Transformer Engine asks for.

    The values are empty without FP8.
    """
    for name in names:
        found = _LINEAR.fullmatch(name)
        if found is not None:
            yield f"{found[1]}._extra_state"
        attention = _ATTENTION.fullmatch(name)
        if attention is not None:
            yield f"{attention[1]}core_attention._extra_state"
