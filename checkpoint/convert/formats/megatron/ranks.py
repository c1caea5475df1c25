"""The reader of Megatron-Core's older folders: one file per rank (mp_rank_XX, mp_rank_XX_YYY)."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import SourceTensor
from holdfast.checkpoint.convert.formats.megatron.optimizer_order import (
    Parameter,
    Unplaced,
    find_states,
    groups_of,
    is_parameter,
    optimizers_of,
)
from holdfast.checkpoint.convert.formats.megatron.state_names import key_of_state
from holdfast.checkpoint.convert.sources import (
    MEGATRON_FILE,
    MEGATRON_RANK,
    StoredTensor,
    TorchFile,
    plain,
    read_torch_file,
)
from holdfast.parallel.errors import CheckpointError

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")
_CHUNK = re.compile(r"model\d*")
_NUMBERS = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}
_OTHERS = {
    "rng_state": "states of Megatron's random generators",
    "rerun_state_machine": "Megatron's own watch over results that do not repeat",
}

_Rank = tuple[int, int]
"""(tensor-parallel rank, pipeline stage)."""


@dataclass(slots=True)
class RankFolder:
    """The content of a folder of ranks."""

    tensors: list[SourceTensor]
    common: dict[str, Any]
    """The values that torch_dist keeps beside tensors: args, iteration, optimizer (its groups),
    opt_param_scheduler."""
    left_out: dict[str, str] = field(default_factory=dict)
    """The reason for each key that is left out."""


@dataclass(frozen=True, slots=True)
class _Model:
    """The model chunks of one rank."""

    file: TorchFile
    tensors: list[tuple[str, StoredTensor]]
    """The tensors by name across all stages, in the order of the chunks' state dicts."""


def read_ranks(root: Path) -> RankFolder:
    """Read the tensors of every rank's file.

    The optimizer's tensors are included only if their parameters can be found.

    Raises:
        CheckpointError: a file is missing, truncated or refused, or has experts of their own files.
    """
    files, (tensor, pipeline) = _open(root)
    first = files[0, 0].content
    told = plain(first.get("args")) or {}
    for axis, found in (("tensor", tensor), ("pipeline", pipeline)):
        said = told.get(f"{axis}_model_parallel_size")
        if said and said != found:
            raise CheckpointError(
                f"{root} has the folders of {found} {axis}-parallel ranks, and its arguments say "
                f"{said}"
            )
    models = _models(files, tied=told.get("untie_embeddings_and_output_weights") is False)
    tensors = [
        model.file.source(key, value, shard=(("tp", index), ("pp", stage)))
        for (index, stage), model in models.items()
        for key, value in model.tensors
    ]
    saved = RankFolder(tensors, {"args": told, "iteration": first.get("iteration", 0)})
    schedule = plain(first.get("opt_param_scheduler", first.get("lr_scheduler")))
    if schedule:
        saved.common["opt_param_scheduler"] = schedule
    if first.get("optimizer"):
        try:
            states, step = _optimizers(root, models)
        except Unplaced as error:
            saved.left_out["optimizer"] = str(error)
        else:
            saved.tensors += states
            saved.common["optimizer"] = {
                "param_groups": groups_of(first["optimizer"]),
                "state": {"common_step": step},
            }
        if any("grad_scaler" in part for part in optimizers_of(first["optimizer"])):
            saved.left_out["optimizer.grad_scaler"] = "the loss scale of fp16 begins anew"
    saved.left_out |= {key: why for key, why in _OTHERS.items() if first.get(key)}
    return saved


def _open(root: Path) -> tuple[dict[_Rank, TorchFile], _Rank]:
    """Every rank's file, and the number of ranks along both axes."""
    ranks: dict[_Rank, str] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        match = MEGATRON_RANK.fullmatch(folder.name)
        if match is None or not (folder / MEGATRON_FILE).is_file():
            continue
        if match[3]:
            raise CheckpointError(
                f"{root} has experts in files of their own ({folder.name}), which cannot be "
                "converted; save it with --ckpt-format torch_dist"
            )
        ranks[int(match[1]), int(match[2] or 0)] = folder.name
    if not ranks:
        raise CheckpointError(f"{root} holds neither a torch_dist checkpoint nor mp_rank folders")
    tensor = 1 + max(index for index, _ in ranks)
    pipeline = 1 + max(stage for _, stage in ranks)
    files: dict[_Rank, TorchFile] = {}
    for index in range(tensor):
        for stage in range(pipeline):
            if (index, stage) not in ranks:
                raise CheckpointError(
                    f"{root} lacks the folder of tensor-parallel rank {index} at pipeline stage "
                    f"{stage}; it was saved by {tensor} x {pipeline}"
                )
            files[index, stage] = read_torch_file(root, f"{ranks[index, stage]}/{MEGATRON_FILE}")
    return files, (tensor, pipeline)


def _models(files: Mapping[_Rank, TorchFile], *, tied: bool) -> dict[_Rank, _Model]:
    """Each rank's model, with layers numbered across chunks: in a file each chunk begins at 0."""
    chunks = [str(key) for key in files[0, 0].content if _CHUNK.fullmatch(str(key))]
    chunks.sort(key=lambda key: int(key.removeprefix("model") or 0))
    depths = {
        (number, stage): _depth(file.content.get(chunk) or {})
        for (index, stage), file in files.items()
        for number, chunk in enumerate(chunks)
        if index == 0
    }
    models = {}
    for (index, stage), file in files.items():
        tensors: list[tuple[str, StoredTensor]] = []
        for number, chunk in enumerate(chunks):
            before = sum(depth for place, depth in depths.items() if place < (number, stage))
            for name, value in (file.content.get(chunk) or {}).items():
                if isinstance(value, StoredTensor):
                    tensors.append((_name(str(name), before, tied), value))
        models[index, stage] = _Model(file, tensors)
    return models


def _depth(model: Mapping[str, Any]) -> int:
    """The number of layers of a model chunk."""
    layers = (_LAYER.fullmatch(str(name)) for name in model)
    return max((1 + int(layer[2]) for layer in layers if layer is not None), default=0)


def _name(name: str, before: int, tied: bool) -> str:
    """The name of a tensor across all stages, given the number of layers before its chunk."""
    if tied and name == "output_layer.weight":
        # The last stage's copy of the embedding is trained like the first stage's.
        return "embedding.word_embeddings.weight"
    layer = _LAYER.fullmatch(name)
    return name if layer is None else f"{layer[1]}{int(layer[2]) + before}{layer[3]}"


def _optimizers(
    root: Path, models: Mapping[_Rank, _Model]
) -> tuple[list[SourceTensor], int | None]:
    """The states of every rank's optimizer, and the number of steps it has done.

    Raises:
        Unplaced: the states of a rank cannot be matched, or ranks have done different numbers of
            steps.
    """
    tensors: list[SourceTensor] = []
    counts: set[int] = set()
    for (index, stage), model in models.items():
        file = model.file
        members = [(key, value) for key, value in model.tensors if is_parameter(key)]
        try:
            found = find_states(
                file.content.get("optimizer"),
                [Parameter(key, value.dtype, value.shape) for key, value in members],
            )
        except Unplaced as error:
            raise Unplaced(f"{file.file}: {error}") from error
        counts |= {_number(root, file, step) for step in found.steps}
        for kind, number, value in found.tensors:
            key = key_of_state(kind, members[number][0])
            tensors.append(file.source(key, value, shard=(("tp", index), ("pp", stage))))
    if len(counts) > 1:
        shown = " and ".join(map(str, sorted(counts)))
        raise Unplaced(f"its parameters have done different numbers of steps ({shown})")
    return tensors, next(iter(counts), None)


def _number(root: Path, file: TorchFile, value: Any) -> int:
    """A count that may be kept as a tensor."""
    if isinstance(value, int | float):
        return int(value)
    if not isinstance(value, StoredTensor):
        raise Unplaced(f"{file.file}: a count of steps is a {type(value).__name__}")
    form = _NUMBERS.get(value.dtype)
    if form is None or any(extent != 1 for extent in value.shape):
        raise Unplaced(f"{file.file}: a count of steps is a {value.dtype} {list(value.shape)}")
    return int(struct.unpack(form, file.read(root, value))[0])
