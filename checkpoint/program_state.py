"""The state of any torch program: tensors by name, and plain values beside them.

DTensors (FSDP2, tensor parallelism) are saved as the boxes that each rank has. Everything else is
assumed to be equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.checkpoint.format import BUFFER, DTYPE_NAMES, TENSOR, WEIGHT, full_name
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout import Box

ProgramState = Mapping[str, Any]
"""By key: a module, an optimizer, a tensor, an object with state_dict, or a value that JSON has."""


@dataclass(frozen=True, slots=True)
class ProgramTensor:
    """One tensor of a program on this rank."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    box: Box
    """The box that this rank has; empty where it has no element."""
    local: Tensor
    changes_in_forward: bool
    """Whether the tensor may change before the optimizer's next step, as buffers may."""

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.local.dtype]


def entries_of(state: ProgramState) -> list[ProgramTensor]:
    """Every tensor of a program's state. Local.

    Raises:
        CheckpointError: a tensor cannot be saved, or two have one name.
    """
    found: list[ProgramTensor] = []
    parameters = parameter_names(state)
    for key, value in state.items():
        if isinstance(value, nn.Module):
            found += _module_entries(key, bare(value))
        elif isinstance(value, Optimizer):
            found += _optimizer_entries(value, parameters)
        elif isinstance(value, Tensor):
            found.append(_program_tensor(key, TENSOR, value, True))
    names: set[str] = set()
    for entry in found:
        if entry.name in names:
            raise CheckpointError(
                f"two tensors are named {entry.name}; save them in two checkpoints"
            )
        names.add(entry.name)
    return found


def bare(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel or torch.compile."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.parallel.DistributedDataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def prefix_of(key: str) -> str:
    """The prefix of a module's names: none under "model", else its key."""
    return "" if key == "model" else f"{key}."


def parameter_names(state: ProgramState) -> dict[nn.Parameter, str]:
    """The name of every parameter of the modules in a state."""
    return {
        parameter: prefix_of(key) + name
        for key, value in state.items()
        if isinstance(value, nn.Module)
        for name, parameter in bare(value).named_parameters()
    }


def name_of_parameter(parameter: nn.Parameter, names: Mapping[nn.Parameter, str]) -> str:
    """The name of an optimizer's parameter.

    Raises CheckpointError if no module in the state has it.
    """
    try:
        return names[parameter]
    except KeyError:
        raise CheckpointError(
            f"the optimizer has a parameter of shape {list(parameter.shape)} that no module in the "
            "state has; give its module too"
        ) from None


def _module_entries(key: str, module: nn.Module) -> Iterator[ProgramTensor]:
    prefix = prefix_of(key)
    for name, parameter in module.named_parameters():
        yield _program_tensor(prefix + name, WEIGHT, parameter, False)
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield _program_tensor(prefix + name, BUFFER, buffer, True)


def _optimizer_entries(
    optimizer: Optimizer, names: Mapping[nn.Parameter, str]
) -> Iterator[ProgramTensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = name_of_parameter(parameter, names)
            for kind, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield _program_tensor(full_name(kind, name), kind, value, False)


def _program_tensor(name: str, kind: str, value: Tensor, changes: bool) -> ProgramTensor:
    local, box = local_part(value, name)
    if local.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{name} has dtype {local.dtype}, which safetensors files cannot hold"
        )
    return ProgramTensor(name, kind, tuple(value.shape), box, local, changes)


def local_part(value: Tensor, name: str) -> tuple[Tensor, Box]:
    """This rank's part of a tensor: its values, and the box that they fill.

    Raises:
        CheckpointError: the local part of a DTensor is not a box, or is a partial sum.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    value = value.detach()
    if not isinstance(value, DTensor):
        return value, Box.whole(value.shape)
    for placement in value.placements:
        if isinstance(placement, Partial):
            raise CheckpointError(f"{name} is a partial sum; redistribute it before saving")
        if type(placement) not in (Replicate, Shard):
            raise CheckpointError(
                f"{name} is placed as {placement}, whose local part is not one box of the tensor"
            )
    mesh: Any = value.device_mesh
    return value.to_local(), _box_of(value.shape, mesh, value.placements)


@lru_cache(maxsize=65536)
def _box_of(shape: torch.Size, mesh: Any, placements: tuple[Any, ...]) -> Box:
    """This rank's box of a DTensor with this shape, mesh and placements."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return Box(tuple(offset), tuple(a + b for a, b in zip(offset, local, strict=True)))


def scalars_of(state: ProgramState) -> dict[str, Any]:
    """The values of a state that are no tensors, for JSON: hyperparameters, schedules, counters."""
    found: dict[str, Any] = {}
    names = parameter_names(state)
    for key, value in state.items():
        if isinstance(value, nn.Module | Tensor):
            continue
        if isinstance(value, Optimizer):
            found[key] = {
                "groups": [
                    {
                        **{k: v for k, v in group.items() if k != "params" and _is_plain(v)},
                        "params": [name_of_parameter(p, names) for p in group["params"]],
                    }
                    for group in value.param_groups
                ]
            }
        else:
            plain = value.state_dict() if hasattr(value, "state_dict") else value
            if not _is_plain(plain):
                raise CheckpointError(
                    f"{key} cannot be saved: its state is not made of numbers, text, lists and "
                    "dicts"
                )
            found[key] = plain
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def restore_scalars(state: ProgramState, scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Restore saved hyperparameters and schedules. Returns the plain values by their keys."""
    plain: dict[str, Any] = {}
    names = parameter_names(state)
    for key, saved in scalars.items():
        value = state.get(key)
        if isinstance(value, Optimizer):
            _restore_groups(value, saved["groups"], names)
        elif value is not None and hasattr(value, "load_state_dict"):
            value.load_state_dict(saved)
        else:
            plain[key] = saved
    return plain


def _restore_groups(
    optimizer: Optimizer, groups: list[dict[str, Any]], names: Mapping[nn.Parameter, str]
) -> None:
    saved = {name: group for group in groups for name in group["params"]}
    for group in optimizer.param_groups:
        first = name_of_parameter(group["params"][0], names) if group["params"] else ""
        for key, value in saved.get(first, {}).items():
            if key != "params" and key in group:
                group[key] = tuple(value) if isinstance(group[key], tuple) else value


def make_optimizer_state(
    optimizer: Optimizer, names: Mapping[nn.Parameter, str], saved: Mapping[str, tuple[int, ...]]
) -> None:
    """Give a fresh optimizer empty tensors for the state that a checkpoint has for it.

    Args:
        saved: the shapes of the checkpoint's tensors, by name.
    """
    suffixes = {name: parameter for parameter, name in names.items()}
    for group in optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        mine = {names[p] for p in group["params"]}
        for name, shape in saved.items():
            kind, _, base = name.partition(".")
            if base not in mine:
                continue
            parameter = suffixes[base]
            if kind in optimizer.state[parameter]:
                continue
            if shape == tuple(parameter.shape) and shape:
                optimizer.state[parameter][kind] = torch.zeros_like(parameter.detach())
            else:
                device = parameter.device if on_device else torch.device("cpu")
                optimizer.state[parameter][kind] = torch.zeros(
                    shape, dtype=torch.float32, device=device
                )
