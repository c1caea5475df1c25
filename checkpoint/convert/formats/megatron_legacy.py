"""Megatron-Core's older folders, of one file a rank (mp_rank_XX, mp_rank_XX_YYY): written; `megatron` reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.checkpoint import directory
from holdfast.checkpoint.convert.catalog import (
    Catalog,
    WriteOptions,
    files_for,
    settle_precision,
)
from holdfast.checkpoint.convert.formats.megatron import read
from holdfast.checkpoint.convert.formats.megatron_writing import (
    NAME as RULES,
)
from holdfast.checkpoint.convert.formats.megatron_writing import (
    beside_tensors,
    find_arguments,
)
from holdfast.checkpoint.convert.inverse import Joined, cut, map_back
from holdfast.checkpoint.convert.output import Output
from holdfast.checkpoint.convert.pieces import Logical
from holdfast.checkpoint.convert.recognition import MEGATRON_TRACKER
from holdfast.checkpoint.convert.rules import builtin_rules
from holdfast.checkpoint.convert.torch_folder import TorchFolder
from holdfast.checkpoint.convert.torch_writing import TORCH_FILE_DTYPES, TensorToCome
from holdfast.parallel.errors import CheckpointError, ConfigError

__all__ = ["NAME", "plan", "read"]
NAME = "megatron-legacy"
_WHERE = f"--to {NAME}"
_FOLDER = "release"
_FORMS = {1: "te", 0: "local"}
"""Forms of Megatron's rules, by the value `transformer_engine`."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_LINEAR = re.compile(r"(.*\.linear_(?:qkv|proj|fc1|fc2))\.weight")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def plan(catalog: Catalog, options: WriteOptions) -> Output:
    """A release for the ranks that the values `tensor` and `pipeline` say (1 each by default): weights only.

    Raises:
        CheckpointError: a tensor that Megatron's GPT model does not have, layers that differ, or something
            that cannot be cut into as many equal parts.
        ConfigError: the source does not tell a size of the model, or a value is out of its range.
    """
    tensor, pipeline = (_count(options.values, name) for name in ("tensor", "pipeline"))
    form = _FORMS.get(options.values.get("transformer_engine", 1))
    if form is None:
        raise ConfigError(
            f"{_WHERE}: --value transformer_engine is 1 (its layers) or 0 (local ones)"
        )
    settled = [
        item
        for item in settle_precision(catalog, options.dtype, masters=False)
        if item[0].kind == "weight"
    ]
    if not settled:
        raise CheckpointError(f"{catalog.root} holds no weights")
    for left in catalog.tensors:
        if left.kind not in ("weight", "master"):
            catalog.left_out[left.full_name] = "mp_rank folders are written with weights only"
    book = builtin_rules(RULES)
    weights = {item.name: item for item, _ in settled}
    arguments, values = find_arguments(catalog, book, options.values, weights, shards=tensor)
    joined = map_back(book, settled, values, _WHERE, form=form, shards=tensor)
    stages = _stages(joined, pipeline, tied="lm_head.weight" not in weights)
    told = {
        **arguments,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "untie_embeddings_and_output_weights": "lm_head.weight" in weights,
        "transformer_impl": "transformer_engine" if form == "te" else "local",
    }
    common = beside_tensors(catalog, told, trained=False)
    folder = TorchFolder()
    for index in range(tensor):
        for stage, members in enumerate(stages):
            shards = [(key, cut(one, index, tensor, _WHERE), one.dtype) for key, one in members]
            place = f"mp_rank_{index:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            states = _kernel_states(key for key, _ in members) if form == "te" else ()
            _add(folder, f"{_FOLDER}/{place}/model_optim_rng.pt", common, shards, states)
    files = files_for(catalog, settled)

    def finish(root: Path, checksums: Sequence[int]) -> None:
        folder.write(root, checksums)
        for name, content in files.items():
            directory.write_synced(root / _FOLDER / name, content)
        directory.write_synced(root / MEGATRON_TRACKER, _FOLDER.encode())

    return Output(folder.sizes, folder.units, finish, settled, "crc32")


def _count(values: Mapping[str, int], name: str) -> int:
    """A number of ranks."""
    count = values.get(name, 1)
    if count < 1:
        raise ConfigError(f"{_WHERE}: --value {name}={count}: give a number of ranks, 1 or more")
    return count


def _stages(joined: Sequence[Joined], count: int, *, tied: bool) -> list[list[tuple[str, Joined]]]:
    """What each pipeline stage has, under the names that it has there: layers count from 0 on each."""
    numbers = {int(found[1]) for one in joined if (found := _LAYER.fullmatch(one.tensor.name))}
    layers = max(numbers, default=-1) + 1
    if layers % count or layers != len(numbers):
        raise CheckpointError(
            f"{_WHERE}: {len(numbers)} layers, numbered up to {layers - 1}, cannot be shared equally by "
            f"{count} pipeline stages; choose another --value pipeline"
        )
    each = layers // count
    stages: list[list[tuple[str, Joined]]] = [[] for _ in range(count)]
    for one in joined:
        name = one.tensor.name
        found = _LAYER.fullmatch(name)
        if found is not None:
            number = int(found[1])
            key = f"decoder.layers.{number % each}.{found[2]}"
            stages[number // each].append((key, one))
        else:
            stages[0 if name.startswith("embedding.") else -1].append((name, one))
        if name == _EMBEDDING and tied and count > 1:
            # The last stage computes its logits with a copy.
            stages[-1].append((_OUTPUT, one))
    return stages


def _kernel_states(names: Iterator[str]) -> Iterator[str]:
    """Keys of what layers keep of their kernels, which Transformer Engine asks for; empty without FP8."""
    for name in names:
        found = _LINEAR.fullmatch(name)
        if found is not None:
            yield f"{found[1]}._extra_state"
            if name.endswith(".linear_qkv.weight"):
                yield name.replace(".linear_qkv.weight", ".core_attention._extra_state")


def _add(
    folder: TorchFolder,
    name: str,
    common: Mapping[str, Any],
    shards: Sequence[tuple[str, Logical, str]],
    states: Iterator[str] | tuple[()],
) -> None:
    for key, _, dtype in shards:
        if dtype not in TORCH_FILE_DTYPES:
            raise CheckpointError(f"{key} has dtype {dtype}, which cannot be written so")
    comes = [
        (TensorToCome(number, dtype, tensor.shape), tensor)
        for number, (_, tensor, dtype) in enumerate(shards)
    ]
    model: dict[str, Any] = {
        key: come for (key, _, _), (come, _) in zip(shards, comes, strict=True)
    }
    model |= dict.fromkeys(states)
    folder.add(name, {**common, "model": model}, comes)
