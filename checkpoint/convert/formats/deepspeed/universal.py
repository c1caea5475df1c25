"""DeepSpeed's universal checkpoints, from which a job of any size and ZeRO stage can resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import FLOATS, LogicalTensor, Output, SourceTensor
from holdfast.checkpoint.convert.formats.deepspeed.states import COUNT, FP32, KINDS, with_states
from holdfast.checkpoint.convert.formats.deepspeed.zero import (
    MODEL,
    NAME as DEEPSPEED,
    as_one_rank,
    describe,
    find_tag,
    refuse_experts,
    scalar,
)
from holdfast.checkpoint.convert.rules import Typed, builtin_rules
from holdfast.checkpoint.convert.sources import (
    Catalog,
    ReadOptions,
    StoredTensor,
    WriteOptions,
    choose_output_dtypes,
    make_catalog,
    read_torch_file,
    tensors_in,
)
from holdfast.checkpoint.convert.writing import (
    TORCH_FILE_DTYPES,
    TensorToCome,
    TorchFolder,
    size,
    write_files,
)
from holdfast.checkpoint.format import BUFFER, UNPREFIXED_KINDS, WEIGHT
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.optimizer import MASTER

NAME = "deepspeed-universal"
_VERSION = "0.19.8"
"""The DeepSpeed version written for checkpoints of other origin; the output was tested with it."""


def read(path: Path, options: ReadOptions) -> Catalog:
    """Read everything in a universal checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or refused.
    """
    root = find_tag(path, "latest_universal")
    refuse_experts(root)
    models = sorted(p.name for p in root.iterdir() if MODEL.fullmatch(p.name))
    if not models or not (root / "zero").is_dir():
        raise CheckpointError(f"{root} lacks {'a model_states.pt' if not models else 'zero/'}")
    # Among several files, that of a job without ZeRO 3 has the weights.
    model = read_torch_file(root, min(models, key=lambda name: (name.startswith("zero_"), name)))
    optimizer = read_torch_file(root, "zero/optimizer_state.pt")
    told = model.content
    shapes = {n: tuple(s) for group in told["param_shapes"] for n, s in group.items()}
    buffers = set(told.get("buffer_names") or ())
    # With tensor parallelism the file has the shards of one rank; weights then come from their
    # master copies.
    cut = int(told.get("mp_world_size") or 1) > 1
    tensors = [
        model.source(f"{'buffer' if name in buffers else 'module'}/{name}", tensor)
        for name, tensor in told.get("module", {}).items()
        # ZeRO 3 leaves empty tensors in the place of weights.
        if isinstance(tensor, StoredTensor) and shapes.get(name, tensor.shape) == tensor.shape
        if name not in (told.get("shared_params") or {}) and (name in buffers or not cut)
    ]
    steps: dict[str, float] = {}
    kinds: dict[str, None] = {}
    for folder in sorted(p for p in (root / "zero").iterdir() if p.is_dir()):
        names = sorted(p.stem for p in folder.glob("*.pt"))
        kinds |= dict.fromkeys(name for name in names if name not in KINDS)
        tensors += _parameter(root, folder.name, names, shapes, steps)
    rules = with_states(builtin_rules(NAME), kinds)
    catalog = make_catalog(NAME, root, tensors, options, rules=rules)
    config = told.get("ds_config") or {}
    for key, name in (("bf16", "BF16"), ("fp16", "F16")):
        if (config.get(key) or {}).get("enabled"):
            catalog.precision = name
    catalog.step = int(told.get("global_steps", 0))
    inner = optimizer.content.get("optimizer_state_dict", {}).get("state", {})
    for kept in inner.values():
        if isinstance(kept.get("step"), StoredTensor):
            steps.setdefault("", scalar(optimizer, root, kept["step"]))
    catalog.scalars = {
        "optimizer_step": int(next(iter(steps.values()), catalog.step)),
        "samples": int(told.get("global_samples", 0)),
        DEEPSPEED: as_one_rank(describe(told, optimizer.content), catalog),
    }
    return catalog


def _parameter(
    root: Path,
    name: str,
    states: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    steps: dict[str, float],
) -> list[SourceTensor]:
    """The tensors in the folder of a parameter: its master copy and its states."""
    found = []
    if FP32 not in states:
        raise CheckpointError(f"{root}/zero/{name} lacks {FP32}.pt")
    for state in sorted(states, key=lambda state: state != FP32):
        file = read_torch_file(root, f"zero/{name}/{state}.pt")
        [(_, tensor)] = list(tensors_in(file.content)) or [(None, None)]
        if not isinstance(tensor, StoredTensor):
            raise CheckpointError(f"{root / file.file} holds no tensor")
        if state == COUNT:
            steps[name] = scalar(file, root, tensor)
        elif name not in shapes:
            found.append(file.source(f"zero_buffer/{name}/{state}", tensor))
        else:
            flat = len(tensor.shape) == 1 and prod(shapes[name]) == tensor.shape[0]
            flat = flat and tensor.shape != shapes[name]
            found.append(
                file.source(
                    f"{state}/{name}",
                    tensor,
                    shard=(("flat", 0),) if flat else (),
                    full_shape=shapes[name] if flat else None,
                )
            )
    return found


def plan(catalog: Catalog, options: WriteOptions) -> Output:
    """Plan a universal checkpoint: a tag's folder, which DeepSpeed reads with `load_universal`."""
    typed = choose_output_dtypes(catalog, options.dtype, masters=True)
    weights = [(t, out) for t, out in typed if t.kind in UNPREFIXED_KINDS]
    trained = set(catalog.trained())
    masters = _masters(typed, trained)
    states = _states(catalog, typed)
    files = TorchFolder()
    _add_model_states(files, catalog, weights, masters)
    step = int(catalog.scalars.get("optimizer_step", catalog.step))
    _add_optimizer_state(files, catalog, step)
    expected = list(weights)
    names = {kind: name for name, kind in KINDS.items()}
    for tensor in [*masters, *states]:
        come = TensorToCome(0, "F32", tensor.shape)
        name = f"zero/{tensor.name}/{names.get(tensor.kind, tensor.kind)}.pt"
        files.add(name, {"cat_dim": 0, "param": come}, [(come, tensor)])
        expected.append((tensor, "F32"))
    for tensor in masters if trained else ():
        files.add_number(f"zero/{tensor.name}/{COUNT}.pt", step)

    def finish(folder: Path, checksums: Sequence[int]) -> None:
        files.write(folder, checksums)
        write_files(folder, catalog.files)

    return Output(files.sizes, files.units, finish, expected, "crc32")


def _masters(typed: Sequence[Typed], trained: set[str]) -> list[LogicalTensor]:
    """The master copies, in 32 bits: of all weights, or of the trained ones if there are any."""
    fine = {t.name: t for t, _ in typed if t.kind == MASTER}
    masters: list[LogicalTensor] = []
    for tensor, out in typed:
        if tensor.kind != WEIGHT or (trained and tensor.name not in trained):
            continue
        masters.append(replace(fine.get(tensor.name, tensor), kind=MASTER))
        if out not in TORCH_FILE_DTYPES:
            raise CheckpointError(f"{tensor.name} has dtype {out}, which cannot be written so")
    return masters


def _states(catalog: Catalog, typed: Sequence[Typed]) -> list[LogicalTensor]:
    """The optimizer states to write; `catalog.left_out` gets the others."""
    kept = {tensor.full_name for tensor in catalog.states()}
    states: list[LogicalTensor] = []
    for tensor, _ in typed:
        if tensor.kind in (*UNPREFIXED_KINDS, MASTER):
            continue
        if tensor.kind in KINDS or tensor.full_name not in kept:
            catalog.left_out[tensor.full_name] = (
                f"the universal format has no place for {tensor.kind}"
            )
        elif tensor.dtype not in FLOATS:
            catalog.left_out[tensor.full_name] = (
                f"the universal format keeps states in F32; {tensor.kind} is {tensor.dtype}"
            )
        else:
            states.append(tensor)
    return states


def _add_model_states(
    files: TorchFolder,
    catalog: Catalog,
    weights: Sequence[tuple[LogicalTensor, str]],
    masters: Sequence[LogicalTensor],
) -> None:
    """Add the model's state twice: as jobs below ZeRO 3 look for it, and as jobs with ZeRO 3 do."""
    told: dict[str, Any] = dict(catalog.scalars.get(DEEPSPEED, {}).get("model_states", {}))
    step = catalog.step
    if not told:
        told = {
            "global_steps": step,
            "global_samples": int(catalog.scalars.get("samples", 0)),
            "skipped_steps": 0,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "buffer_names": [t.name for t, _ in weights if t.kind == BUFFER],
            "shared_params": {},
            # DeepSpeed's schedules and torch's read these.
            "lr_scheduler": {
                "last_batch_iteration": step - 1,
                "last_epoch": step,
                "_step_count": step + 1,
            },
            "ds_config": {},
            "ds_version": _VERSION,
        }
    shapes = told.get("param_shapes") or [[(t.name, t.shape) for t in masters]]
    told["param_shapes"] = [{n: size(shape) for n, shape in group} for group in shapes]
    told.setdefault("universal_checkpoint_info", {"universal_checkpoint_version": 0.4})
    told["optimizer"] = None
    for name, chosen in (
        ("mp_rank_00_model_states.pt", weights),
        (
            "zero_pp_rank_0_mp_rank_00_model_states.pt",
            [w for w in weights if w[0].kind == BUFFER],
        ),
    ):
        comes = [
            (TensorToCome(number, out, tensor.shape), tensor)
            for number, (tensor, out) in enumerate(chosen)
        ]
        module = {tensor.name: come for come, tensor in comes}
        files.add(name, {**told, "module": module}, comes)


def _add_optimizer_state(files: TorchFolder, catalog: Catalog, step: int) -> None:
    """Add the optimizer's values that are not tensors of parameters."""
    told = catalog.scalars.get(DEEPSPEED, {})
    groups = told.get("param_groups")
    if not groups:
        catalog.leave_out_groups()
        optimizer = catalog.config.get("optimizer", {})
        kept = {key: optimizer[key] for key in ("lr", "eps", "weight_decay") if key in optimizer}
        if "betas" in optimizer:
            kept["betas"] = list(optimizer["betas"])
        groups = [{**kept, "params": [0]}]
    content = {
        "clip_grad": told.get("clip_grad", 0.0),
        "ds_version": told.get("model_states", {}).get("ds_version", _VERSION),
        "param_groups": groups,
    }
    files.add_number(
        "zero/optimizer_state.pt",
        step,
        lambda come: {
            **content,
            # ZeRO 3 looks here.
            "optimizer_state_dict": {"state": {0: {"step": come}}, "param_groups": groups},
        },
    )
