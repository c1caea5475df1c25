"""What is saved of a program on one rank: its tensors by name, and a document for each key.

DTensors (FSDP2, tensor parallelism) are saved as the boxes that each rank has. Every other tensor
is one that ranks either share or have each its own of; checkpoint/program/agreement.py finds out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.checkpoint.format import BUFFER, TENSOR, UNPREFIXED_KINDS, WEIGHT, full_name
from holdfast.checkpoint.program.merging import OWN_NAME
from holdfast.checkpoint.program.modules import (
    bare,
    buffers_are_led,
    extra_states,
    module_tensors,
    prefix_of,
)
from holdfast.checkpoint.program.tensors import ProgramTensor, is_dtensor, program_tensor
from holdfast.checkpoint.program.values import TAG, encode
from holdfast.parallel.errors import CheckpointError

ProgramState = Mapping[str, Any]
"""By key: a module, an optimizer, an object with state_dict, a tensor, or a value of values.py."""
_METADATA = "__metadata__"
"""The key of a safetensors file that is no tensor's name."""
_OPTIMIZER_HOOKS = tuple(
    f"_optimizer_{when}_hooks"
    for when in (
        "state_dict_pre",
        "state_dict_post",
        "load_state_dict_pre",
        "load_state_dict_post",
    )
)
"""Where torch keeps the hooks that see or change an optimizer's state_dict."""


@dataclass(slots=True)
class Described:
    """The state of a program on this rank."""

    tensors: list[ProgramTensor] = field(default_factory=list)
    docs: dict[str, Any] = field(default_factory=dict)
    """By key: what the manifest says of it."""
    _names: set[str] = field(default_factory=set)

    def add(
        self, value: Tensor, names: list[tuple[str, str]], key: str, path: str, **how: bool
    ) -> str:
        """Add a tensor under the first free name. Returns it.

        Args:
            names: (kind, name), by preference; the last one gets a number where it is taken.
        """
        free = ((k, n) for k, n in names if n not in self._names and _is_name(n, how))
        kind, name = next(free, names[-1])
        number = 2
        while name in self._names or not _is_name(name, how):
            name = f"{names[-1][1]}#{number}"
            number += 1
        self._names.add(name)
        self.tensors.append(program_tensor(value, name, kind, key, path, **how))
        return name


def _is_name(name: str, how: Mapping[str, bool]) -> bool:
    """Whether a tensor may have a name: no file's own key, and no other rank's name for another."""
    return name != _METADATA and not (how.get("own") and OWN_NAME.fullmatch(name))


def describe(state: ProgramState) -> Described:
    """The state of a program on this rank. Local.

    Raises:
        CheckpointError: a leaf cannot be saved exactly; it is named by its path.
    """
    check_state(state)
    found = Described()
    names: dict[Tensor, str] = {}
    for key, value in state.items():
        if isinstance(value, nn.Module):
            _describe_module(found, key, value, names)
    for key, value in state.items():
        if isinstance(value, nn.Module):
            continue
        if is_plain_optimizer(value):
            found.docs[key] = _describe_optimizer(found, key, value, names)
        else:
            found.docs[key] = _describe_value(found, key, value)
    # The manifest lists the keys in the state's order.
    found.docs = {key: found.docs[key] for key in state}
    return found


def check_state(state: ProgramState) -> None:
    """Refuse what is no state, and wrappers whose state is in pieces that only they can join.

    Raises:
        CheckpointError: the state is no mapping by text, or a value of it is refused by its key.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"a state is a dict such as {{'model': model, 'optimizer': optimizer}}, not "
            f"{type(state).__name__}"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not key or not _is_unicode(key):
            raise CheckpointError(
                f"the state has the key {key!r}; keys are text that is not empty and is Unicode"
            )
        if isinstance(value, nn.Module):
            for name, module in value.named_modules():
                if _is_a(module, "FullyShardedDataParallel"):
                    raise CheckpointError(
                        f"{key}{'.' if name else ''}{name} is an FSDP1 module, whose parameters "
                        "are shards of flat parameters; use FSDP2 "
                        "(torch.distributed.fsdp.fully_shard), or save what "
                        "FSDP.state_dict_type(model, FULL_STATE_DICT) collects"
                    )
        elif _is_a(value, "ZeroRedundancyOptimizer"):
            raise CheckpointError(
                f"{key} is a ZeroRedundancyOptimizer, whose state is spread over the ranks; use "
                "FSDP2 (torch.distributed.fsdp.fully_shard) and the optimizer inside it"
            )


def _is_unicode(text: str) -> bool:
    """Whether a text has a form in UTF-8; one with half of a surrogate pair has none."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_a(value: object, name: str) -> bool:
    """Whether a value's class has this name or is derived from one; nothing is imported for it."""
    return any(kind.__name__ == name for kind in type(value).__mro__)


def is_plain_optimizer(value: object) -> bool:
    """Whether an optimizer's state is its `state` and `param_groups`, as torch's own are.

    Another one's `state_dict`, or that of one with hooks of its own for it, is asked; it has
    parameters by number.
    """
    return is_torch_optimizer(value) and not any(
        value.__dict__.get(hooks) for hooks in _OPTIMIZER_HOOKS
    )


def is_torch_optimizer(value: object) -> bool:
    """Whether a value is an optimizer with torch's own `state_dict`."""
    return isinstance(value, Optimizer) and type(value).state_dict is Optimizer.state_dict


def is_object(value: Any) -> bool:
    """Whether a value has a state of its own."""
    return not isinstance(value, type) and hasattr(value, "state_dict")


def _describe_module(
    found: Described, key: str, wrapped: nn.Module, names: dict[Tensor, str]
) -> None:
    module, prefix = bare(wrapped), prefix_of(key)
    parameters, buffers = module_tensors(module, key)
    led = buffers_are_led(wrapped)
    listed: dict[str, str] = {}
    for name, parameter in parameters.items():
        full = prefix + name
        if names.get(parameter) == full:
            # Another key has this very tensor under this very name.
            listed[name] = full
            continue
        listed[name] = found.add(parameter, [(WEIGHT, full)], key, full)
        names.setdefault(parameter, listed[name])
    for name, buffer in buffers.items():
        full = prefix + name
        listed[name] = found.add(buffer, [(BUFFER, full)], key, full, own=not led, led=led)
    keep = _keeper(found, key, lambda path: [(TENSOR, dotted(path))], own=True)
    extra = {
        name: encode(inner.get_extra_state(), f"{prefix}{name}", keep)
        for name, inner in extra_states(module).items()
    }
    found.docs[key] = {TAG: "module", "tensors": listed, "extra": extra}


def _keeper(
    found: Described,
    key: str,
    names_of: Callable[[str], list[tuple[str, str]]],
    *,
    own: bool,
    home: str = "cpu",
    beside_dtensor: bool = False,
) -> Callable[[Tensor, str], dict[str, Any]]:
    """The function by which tensors inside values come into the checkpoint.

    Args:
        names_of: from a path, the names to choose from; see `Described.add`.
        home: the type of device where such a tensor is expected; another one is written down.
        beside_dtensor: whether it belongs to a parameter that is a DTensor.
    """

    def keep(value: Tensor, path: str) -> dict[str, Any]:
        if own and not (is_dtensor(value) or type(value) in (Tensor, nn.Parameter)):
            raise CheckpointError(
                f"{path} cannot be saved: it is a {type(value).__qualname__}, a tensor with a "
                "class of its own; save what its as_subclass(torch.Tensor) gives"
            )
        doc: dict[str, Any] = {TAG: "tensor"}
        doc["name"] = found.add(value, names_of(path), key, path, own=own)
        if value.device.type != home:
            doc["device"] = value.device.type
        if value.requires_grad:
            doc["grad"] = True
        if isinstance(value, nn.Parameter):
            doc["parameter"] = True
        if is_dtensor(value) or beside_dtensor:
            doc["dtensor"] = is_dtensor(value)
        return doc

    return keep


def dotted(path: str) -> str:
    """A tensor's name made of its path: `schedule.base_lrs.0` of `schedule['base_lrs'][0]`."""
    return re.sub(r"\['?(.*?)'?\]", r".\1", path)


def _describe_value(found: Described, key: str, value: Any) -> Any:
    keep = _keeper(found, key, lambda path: [(TENSOR, dotted(path))], own=True)
    if is_object(value):
        return {TAG: "object", "value": encode(value.state_dict(), key, keep)}
    return encode(value, key, keep)


def _describe_optimizer(
    found: Described, key: str, optimizer: Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Any]:
    keep = _keeper(found, key, lambda path: [(TENSOR, dotted(path))], own=False)
    groups, mine = [], []
    for number, group in enumerate(optimizer.param_groups):
        path = f"{key}.param_groups[{number}]"
        listed = [name_of_parameter(p, names, key) for p in group["params"]]
        values = {k: v for k, v in group.items() if k != "params"}
        if not all(type(k) is str for k in values):
            raise CheckpointError(f"{path} cannot be saved: its keys are not all text")
        encoded = {k: encode(v, f"{path}[{k!r}]", keep) for k, v in values.items()}
        groups.append({**encoded, "params": listed})
        mine += zip(listed, group["params"], strict=True)
    states = {
        name: _describe_parameter_state(found, key, name, parameter, optimizer.state[parameter])
        for name, parameter in mine
        if parameter in optimizer.state
    }
    grouped = {id(parameter) for _, parameter in mine}
    other = []
    for owner, value in optimizer.state.items():
        if id(owner) in grouped:
            continue
        if isinstance(owner, Tensor):
            raise CheckpointError(
                f"{key}.state has state of a tensor of shape {list(owner.shape)} that is in none "
                "of its param_groups"
            )
        path = f"{key}.state[{owner!r}]"
        other.append([encode(owner, path, keep), encode(value, path, keep)])
    return {TAG: "optimizer", "groups": groups, "state": states, "other": other}


def _describe_parameter_state(
    found: Described, key: str, name: str, parameter: Tensor, state: Any
) -> Any:
    path = f"{key}.state[{name}]"

    def names_of(place: str) -> list[tuple[str, str]]:
        kind = dotted(place.removeprefix(path)).strip(".") or "state"
        own = f"{key}.{kind}"
        wanted = [] if kind in UNPREFIXED_KINDS else [(kind, full_name(kind, name))]
        return [*wanted, (own, full_name(own, name))]

    keep = _keeper(
        found,
        key,
        names_of,
        own=False,
        home=parameter.device.type,
        beside_dtensor=is_dtensor(parameter),
    )
    return encode(state, path, keep)


def name_of_parameter(parameter: Tensor, names: Mapping[Tensor, str], key: str) -> str:
    """The name of an optimizer's parameter.

    Raises CheckpointError if no module in the state has it.
    """
    try:
        return names[parameter]
    except KeyError:
        raise CheckpointError(
            f"{key} has a parameter of shape {list(parameter.shape)} that no module in the state "
            "has; give its module too"
        ) from None
