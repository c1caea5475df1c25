"""DeepSpeed's own checkpoints, ZeRO 1 to 3: flat partitions by rank, and the model's state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from holdfast.checkpoint.convert.elements import SourceTensor, number as number_of
from holdfast.checkpoint.convert.formats.deepspeed.states import (
    FP32,
    KINDS,
    partitions,
    with_states,
)
from holdfast.checkpoint.convert.formats.deepspeed.tensor_parallel import tensor_parallel_rules
from holdfast.checkpoint.convert.rules import RuleBook, builtin_rules
from holdfast.checkpoint.convert.sources import (
    ZERO_FILE,
    Catalog,
    PickledObject,
    ReadOptions,
    StoredTensor,
    TorchFile,
    make_catalog,
    plain,
    read_torch_file,
)
from holdfast.checkpoint.format import ELEMENT_BYTES
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.reading import read_name

NAME = "deepspeed"
MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt")
EXPERT = re.compile(r"(?:layer_-?\d+_)?expert_\d+_.*model_states\.pt|expp_rank_\d+_.*\.pt")
"""The files of expert layers: an expert's weights, and the states of a rank's experts."""
TENSOR_STATES = ("module", "optimizer", "frozen_param_fragments")
"""The keys of a model's state that hold tensors; the other keys are carried as plain values."""


def find_tag(path: Path, latest: str = "latest") -> Path:
    """The folder of one save: the path itself, or the folder that `latest` in it names."""
    named = path / latest
    if named.is_file():
        tag = read_name(named)
        if tag and "/" not in tag and (path / tag).is_dir():
            return path / tag
        raise CheckpointError(f"{named} names {tag!r}, and there is no such folder")
    return path


NO_TENSOR = "extra state of a module, which is no tensor"
_Rank = tuple[int, int]
"""(tensor-parallel rank, data-parallel rank)."""


@dataclass(frozen=True, slots=True)
class _RankFiles:
    """The opened files of a save."""

    root: Path
    models: Mapping[_Rank, TorchFile]
    """Below ZeRO 3, only the files of data-parallel rank 0."""
    optimizers: Mapping[_Rank, TorchFile]
    stage: int
    ranks: _Rank
    """The number of ranks along each axis."""

    @property
    def told(self) -> Mapping[str, Any]:
        """Rank 0's description of the model."""
        return self.models[0, 0].content

    def shapes(self) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Names and shapes of the trained parameters on a tensor-parallel rank, by group.

        They are in the order of the flat partitions.
        """
        return [
            [(str(name), tuple(shape)) for name, shape in group.items()]
            for group in self.told["param_shapes"]
        ]

    def place(self, rank: _Rank, *, fragment: bool = True) -> tuple[tuple[str, int], ...]:
        """The coordinates of a rank's shard or fragment."""
        found = [("tp", rank[0])] if self.ranks[0] > 1 else []
        return (*found, ("dp", rank[1])) if fragment else tuple(found)


def read(path: Path, options: ReadOptions) -> Catalog:
    """Read the weights, master copies and optimizer states of a save.

    Raises:
        CheckpointError: a file is missing, truncated or refused, or partitions do not make up a
            tensor.
        ConfigError: the job used pipeline parallelism, or the save does not say how tensors are
            cut.
    """
    root = find_tag(path)
    save = _open(root)
    left_out: dict[str, str] = {}
    states = list(_optimizer_tensors(save, left_out))
    tensors = [*_model_tensors(save, left_out), *states]
    told = save.told
    names = dict.fromkeys(tensor.key.partition("/")[0] for tensor in states)
    catalog = make_catalog(NAME, root, tensors, options, rules=_rules(save, names, options))
    catalog.left_out |= left_out
    config = told.get("ds_config", {})
    for key, name in (("bf16", "BF16"), ("fp16", "F16")):
        if isinstance(config.get(key), Mapping) and config[key].get("enabled"):
            catalog.precision = name
    for alias, name in (told.get("shared_params") or {}).items():
        catalog.left_out[alias] = f"the same tensor as {name}"
    catalog.step = int(told.get("global_steps", 0))
    catalog.scalars = {
        "optimizer_step": _steps(save),
        "samples": int(told.get("global_samples", 0)),
        NAME: as_one_rank(
            describe(told, save.optimizers[0, 0].content["optimizer_state_dict"]), catalog
        ),
    }
    return catalog


def as_one_rank(described: dict[str, Any], catalog: Catalog) -> dict[str, Any]:
    """The plain values of a save, as if there had been one tensor-parallel rank."""
    model = described["model_states"]
    if int(model.get("mp_world_size") or 1) > 1:
        shapes = {tensor.name: list(tensor.shape) for tensor in catalog.tensors}
        model["mp_world_size"] = 1
        model["param_shapes"] = [
            [[name, shapes[name]] for name, _ in group] for group in model["param_shapes"]
        ]
        for key in ("universal_checkpoint_info", "checkpoint_parallel_dimensions"):
            model.pop(key, None)
    return described


def _rules(save: _RankFiles, names: Iterable[str], options: ReadOptions) -> RuleBook | None:
    """The format's rules for the states of these names; None if the user's rules replace them.

    The save's own rules come first if it is of several tensor-parallel ranks.
    """
    if options.rules is not None:
        return None
    own = with_states(builtin_rules(NAME), (name for name in names if name not in KINDS))
    if save.ranks[0] == 1:
        return own
    shapes = {name: shape for group in save.shapes() for name, shape in group}
    info = save.told.get("universal_checkpoint_info")
    given = tensor_parallel_rules(info, shapes, save.ranks[0], str(save.root))
    return msgspec.structs.replace(own, rules=given + own.rules)


def describe(told: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a save that DeepSpeed needs to resume."""
    inner = optimizer.get("optimizer_state_dict", optimizer.get("base_optimizer_state", {}))
    groups = optimizer.get("param_groups")
    if groups is None and isinstance(inner, Mapping):
        groups = inner.get("param_groups", [])
    state = {key: value for key, value in told.items() if key not in TENSOR_STATES}
    shapes = [[(name, tuple(shape)) for name, shape in g.items()] for g in told["param_shapes"]]
    return {
        "model_states": plain({**state, "param_shapes": shapes}),
        "param_groups": plain(groups),
        "clip_grad": plain(optimizer.get("clip_grad", 0.0)),
    }


def refuse_experts(root: Path) -> None:
    """Refuse a save of DeepSpeed's own expert layers, whose files are by expert.

    Raises:
        ConfigError: there is such a file.
    """
    found = next((f.name for f in sorted(root.iterdir()) if EXPERT.fullmatch(f.name)), None)
    if found is not None:
        raise ConfigError(
            f"{root} has experts in files of their own ({found}), which are not converted: the "
            "weights and states of other ranks' experts would be missing; load it with DeepSpeed, "
            "gather the model's state_dict and convert that"
        )


def _open(root: Path) -> _RankFiles:
    refuse_experts(root)
    models: dict[_Rank, TorchFile] = {}
    optimizers: dict[_Rank, TorchFile] = {}
    for pattern, found in ((MODEL, models), (ZERO_FILE, optimizers)):
        for file in sorted(root.iterdir()):
            match = pattern.fullmatch(file.name)
            if match is not None:
                rank = int(match["mp"]), int(match["dp"] or 0)
                if rank not in found:
                    found[rank] = read_torch_file(root, file.name)
    if (0, 0) not in models or (0, 0) not in optimizers:
        missing = "model_states" if (0, 0) not in models else "optim_states"
        raise CheckpointError(f"{root} lacks the file *rank_0*_{missing}.pt of rank 0")
    told = models[0, 0].content
    first = optimizers[0, 0].content.get("optimizer_state_dict")
    if not isinstance(first, Mapping) or "param_shapes" not in told:
        raise CheckpointError(f"{root} is not of ZeRO: its files have no optimizer_state_dict")
    stage = first.get("zero_stage", 0)
    stage = int(stage.args[0] if isinstance(stage, PickledObject) else stage)
    pipeline = (told.get("checkpoint_parallel_dimensions") or {}).get("pp_degree", 1)
    if (pipeline and int(pipeline) > 1) or any(root.glob("layer_*-model_states.pt")):
        raise ConfigError(
            f"{root} was trained with pipeline parallelism, which is not converted; make a "
            "universal checkpoint of it with DeepSpeed and convert that"
        )
    ranks = int(told.get("mp_world_size") or 1), int(told.get("dp_world_size") or 1)
    for rank in product(*map(range, ranks)):
        needed = rank[1] == 0 or stage == 3
        if rank not in optimizers or (needed and rank not in models):
            kind = "optim" if rank not in optimizers else "model"
            raise CheckpointError(
                f"{root} lacks the {kind}_states.pt of data-parallel rank {rank[1]}, "
                f"tensor-parallel rank {rank[0]}; it was saved by {ranks[1]} x {ranks[0]}"
            )
    return _RankFiles(root, models, optimizers, stage, ranks)


def _model_tensors(save: _RankFiles, left_out: dict[str, str]) -> Iterator[SourceTensor]:
    """The weights (below ZeRO 3), buffers and frozen parameters; `left_out` gets the others."""
    told = save.told
    buffers = set(told.get("buffer_names") or ())
    shared = set(told.get("shared_params") or {})
    for rank, file in save.models.items():
        if rank[1]:
            continue
        for name, tensor in file.content.get("module", {}).items():
            if name in shared:
                continue
            if not isinstance(tensor, StoredTensor):
                left_out[name] = NO_TENSOR
                continue
            if name in buffers:
                # Every rank has them; rank 0's count.
                if rank == (0, 0):
                    yield file.source(f"buffer/{name}", tensor)
            elif save.stage < 3:
                yield file.source(name, tensor, shard=save.place(rank, fragment=False))
    if save.stage < 3:
        return
    for name, shape in (told.get("frozen_param_shapes") or {}).items():
        for rank, model in save.models.items():
            fragment = model.content["frozen_param_fragments"][name]
            yield model.source(name, fragment, shard=save.place(rank), full_shape=tuple(shape))


def _optimizer_tensors(save: _RankFiles, left_out: dict[str, str]) -> Iterator[SourceTensor]:
    """The master copies and states; `left_out` gets the rest, with the reason."""
    for rank, file in save.optimizers.items():
        optimizer = file.content["optimizer_state_dict"]
        if save.stage == 3:
            yield from _stage_3(save, rank, file, optimizer, left_out)
        else:
            yield from _stages_1_and_2(save, rank, file, optimizer, left_out)


def _part(
    file: TorchFile,
    flat: StoredTensor,
    start: int,
    count: int,
    key: str,
    place: tuple[tuple[str, int], ...],
    shape: tuple[int, ...],
) -> SourceTensor:
    """`count` elements of a flat partition from element `start` on."""
    part = StoredTensor(flat.storage, flat.dtype, (count,), (1,), flat.start + start)
    return file.source(key, part, shard=place, full_shape=shape)


def _stages_1_and_2(
    save: _RankFiles,
    rank: _Rank,
    file: TorchFile,
    optimizer: Mapping[str, Any],
    left_out: dict[str, str],
) -> Iterator[SourceTensor]:
    shapes = {name: shape for group in save.shapes() for name, shape in group}
    mappings = optimizer.get("param_slice_mappings")
    state = optimizer.get("base_optimizer_state")
    if mappings is None or not isinstance(state, Mapping):
        raise CheckpointError(
            f"{save.root / file.file} does not say where parameters lie (param_slice_mappings); it "
            "is of DeepSpeed before 0.8, or was saved as an elastic checkpoint: save it again"
        )
    for number, mapping in enumerate(mappings):
        fp32 = optimizer["single_partition_of_fp32_groups"][number]
        spans = {n: (int(a.get("start")), int(a.get("numel"))) for n, a in mapping.items()}
        elements = max((start + count for start, count in spans.values()), default=0)
        flats = {FP32: fp32, **partitions(state["state"].get(number, {}), elements, left_out)}
        for name, (start, count) in spans.items():
            for kind, flat in flats.items():
                key = f"{kind}/{name}"
                yield _part(file, flat, start, count, key, save.place(rank), shapes[name])


def _stage_3(
    save: _RankFiles,
    rank: _Rank,
    file: TorchFile,
    optimizer: Mapping[str, Any],
    left_out: dict[str, str],
) -> Iterator[SourceTensor]:
    ranks = save.ranks[1]
    inner = optimizer["optimizer_state_dict"]["state"]
    groups = list(optimizer["fp32_flat_groups"])
    kept = [
        partitions(inner[number], flat.shape[0], left_out)
        for number, flat in zip(sorted(inner), groups, strict=False)
    ]
    kinds = {FP32: groups}
    for kind in dict.fromkeys(kind for states in kept for kind in states):
        if all(kind in states for states in kept) and len(kept) == len(groups):
            kinds[kind] = [states[kind] for states in kept]
        else:
            left_out[f"optimizer state {kind}"] = "only some of the flat groups have it"
    for kind, flats in kinds.items():
        group, position = 0, 0
        for name, shape in (item for listed in save.shapes() for item in listed):
            # Every rank has equally many elements of a parameter, the last one with padding.
            count = -(-prod(shape) // ranks)
            while group < len(flats) and position + count > flats[group].shape[0]:
                if position != flats[group].shape[0]:
                    raise CheckpointError(
                        f"{save.root / file.file}: {name} does not fit its flat group {group} of "
                        f"{flats[group].shape[0]} elements"
                    )
                group, position = group + 1, 0
            if group == len(flats):
                raise CheckpointError(
                    f"{save.root / file.file}: no flat group has {kind} of {name}"
                )
            key = f"{kind}/{name}"
            yield _part(file, flats[group], position, count, key, save.place(rank), shape)
            position += count


def _steps(save: _RankFiles) -> int:
    """The number of updates that the optimizer has made."""
    file = save.optimizers[0, 0]
    optimizer = file.content["optimizer_state_dict"]
    inner = optimizer.get("optimizer_state_dict", optimizer.get("base_optimizer_state", {}))
    state = inner.get("state", {}) if isinstance(inner, Mapping) else {}
    for kept in state.values():
        step = kept.get("step")
        if isinstance(step, StoredTensor):
            return int(scalar(file, save.root, step))
        if isinstance(step, int | float):
            return int(step)
    return int(save.told.get("global_steps", 0)) - int(save.told.get("skipped_steps", 0))


def scalar(file: TorchFile, root: Path, tensor: StoredTensor) -> float:
    """The value of a tensor of one element."""
    content = bytearray(file.read(root, tensor))
    if len(content) != ELEMENT_BYTES[tensor.dtype]:
        raise CheckpointError(f"{root / file.file} is truncated")
    return float(number_of(bytes(content), tensor.dtype))
