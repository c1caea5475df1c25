"""The order of parameters in the states of Megatron's optimizers, by group. Pure.

A group has the parameters that are treated alike, in the order of the model's `named_parameters()`,
which is that of its state dict without buffers (Megatron-Core, `_get_param_groups`). Nothing in a
file names the parameter of a state. It follows from names and dimensions, and is accepted only if
counts and every shape agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.convert.sources import StoredTensor, plain
from holdfast.checkpoint.format import STEP
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.optimizer import MASTER

HALVES = ("BF16", "F16")
_BUFFER = re.compile(r".*(\.inv_freq|\.expert_bias|_tokens_per_expert|_extra_state)")
_EXPERT = re.compile(r".*\.mlp\.experts\..*")
_QUERY_KEY_NORM = re.compile(r".*\.[qk]_layernorm\..*")
_ENDS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""The parameters that get a learning rate of their own from --decoupled-lr."""
_MODULES = (
    "embedding.word_embeddings",
    "embedding.position_embeddings",
    "decoder.layers",
    "decoder.final_layernorm",
    "mtp.layers",
    "output_layer",
)
_LAYER_MODULES = (
    "enorm",
    "hnorm",
    "eh_proj",
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "self_attention.kv_layernorm",
    "pre_mlp_layernorm",
    "mlp.router",
    "mlp.experts",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "final_layernorm",
)
"""The modules in the order in which Megatron's GPT model and its layers make them."""
_PARTS = ("layer_norm_weight", "layer_norm_bias", "weight", "bias", "expert_bias")
"""The parameters in the order in which a module makes them."""
_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.(?:transformer_layer\.)?(.*)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])")


class Unplaced(CheckpointError):
    """The parameter of an optimizer state is unknown, or the state is kept elsewhere."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model on one rank."""

    key: str
    """The name, with layers counted across all stages."""
    dtype: str
    shape: tuple[int, ...]

    def decays(self, *, query_key_norms: bool = False) -> bool:
        """Whether it has weight decay; `query_key_norms` is --apply-wd-to-qk-layernorm."""
        if len(self.shape) != 1 and not self.key.endswith(".bias"):
            return True
        return query_key_norms and _QUERY_KEY_NORM.fullmatch(self.key) is not None


@dataclass(frozen=True, slots=True)
class Found:
    """The optimizer state of one rank."""

    tensors: tuple[tuple[str, int, StoredTensor], ...]
    """The kind, the parameter's number, and the state or master copy."""
    steps: tuple[Any, ...]
    """The step counts wherever the file has them: numbers, or tensors of one number."""


@dataclass(frozen=True, slots=True)
class _Group:
    label: tuple[bool, bool, bool]
    """Whether it decays, belongs to differently cut experts, and has its own learning rate."""
    states: tuple[Any, ...]
    masters: tuple[Any, ...] | None
    """The master copies of 16-bit parameters; None if parameters are trained in 32 bits."""


def is_parameter(name: str) -> bool:
    """Whether a tensor of a state dict is a parameter of the model."""
    return _BUFFER.fullmatch(name) is None


def optimizers_of(kept: Any) -> list[Mapping[str, Any]]:
    """The optimizers that were saved: one, or several that run one after the other."""
    if isinstance(kept, Mapping) and kept and all(str(key).isdecimal() for key in kept):
        kept = [kept[key] for key in sorted(kept, key=int)]
    parts = kept if isinstance(kept, list | tuple) else [kept]
    return [part for part in parts if isinstance(part, Mapping)]


def torch_state(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of torch's optimizer inside the state of the optimizer around it."""
    inner = part.get("optimizer", part.get("optimizer_state_dict", part))
    return inner if isinstance(inner, Mapping) else {}


def groups_of(kept: Any) -> list[dict[str, Any]]:
    """The settings of the parameter groups, without the parameters."""
    groups = (
        group
        for part in optimizers_of(kept)
        for group in torch_state(part).get("param_groups") or ()
        if isinstance(group, Mapping)
    )
    return [
        plain({key: value for key, value in group.items() if key != "params"}) for group in groups
    ]


def find_states(kept: Any, parameters: Sequence[Parameter]) -> Found:
    """Match the states of a rank's optimizer with parameters.

    Args:
        kept: `optimizer` of the rank's file.
        parameters: the parameters of all its model chunks, in the order of their state dicts.
    Raises:
        Unplaced: the states cannot be matched; the message says why.
    """
    groups: list[_Group] = []
    steps: list[Any] = []
    for part in optimizers_of(kept):
        found, counted = _groups(part, len(groups))
        groups += found
        steps += counted
    if not any(any(group.states) for group in groups):
        raise Unplaced("it has no states of parameters, as before the first step")
    fits: list[tuple[tuple[str, int, StoredTensor], ...]] = []
    why = ""
    for query_key_norms in (False, True):
        try:
            placed = tuple(_place(groups, parameters, query_key_norms))
        except Unplaced as error:
            why = why or str(error)
            continue
        if placed not in fits:
            fits.append(placed)
    if len(fits) != 1:
        raise Unplaced(why or "its groups fit the model's parameters in more than one way")
    return Found(fits[0], tuple(steps))


def _groups(part: Mapping[str, Any], before: int) -> tuple[list[_Group], list[Any]]:
    inner = torch_state(part)
    states, described = inner.get("state"), inner.get("param_groups")
    if not isinstance(states, Mapping) or not isinstance(described, list | tuple):
        raise Unplaced(
            "the distributed optimizer keeps its states by buckets, in distrib_optim.pt; save it "
            "with --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"
        )
    masters = part.get("fp32_from_fp16_params", part.get("fp32_from_fp16"))
    copied = [None] * len(described) if masters is None else _items(masters, "master copies")
    if len(copied) != len(described):
        raise Unplaced(f"it has {len(described)} groups and master copies of {len(copied)}")
    groups = []
    steps: list[Any] = []
    for number, group in enumerate(described):
        name = f"group {before + number}"
        if not isinstance(group, Mapping):
            raise Unplaced(f"{name} is a {type(group).__name__}")
        decay = group.get("wd_mult", group.get("pre_wd_mult"))
        if decay is None:
            raise Unplaced(f"{name} does not say wd_mult")
        label = (
            decay != 0,
            bool(group.get("is_expert_parallel")),
            bool(group.get("is_decoupled_lr")) or group.get("default_config") is False,
        )
        kept = (states.get(index) for index in _items(group.get("params"), f"params of {name}"))
        members = tuple(state if isinstance(state, Mapping) else {} for state in kept)
        own = copied[number]
        own = None if own is None else _items(own, f"master copies of {name}")
        groups.append(_Group(label, members, own))
        steps += [state[STEP] for state in members if STEP in state]
        if group.get("step") is not None and members:
            steps.append(group["step"])
    return groups, steps


def _items(value: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Unplaced(f"the {what} are no list ({type(value).__name__})")
    return tuple(value)


def _kinds_of(groups: Sequence[_Group]) -> tuple[str, ...]:
    """The names of the tensors that the optimizers keep of parameters, without counts of steps."""
    states = (state for group in groups for state in group.states)
    kept = ((name, value) for state in states for name, value in state.items())
    names = (str(name) for name, value in kept if isinstance(value, StoredTensor))
    return tuple(dict.fromkeys(name for name in names if name != STEP))


def _place(
    groups: Sequence[_Group], parameters: Sequence[Parameter], query_key_norms: bool
) -> Iterator[tuple[str, int, StoredTensor]]:
    kinds = _kinds_of(groups)
    apart = any(group.label[2] for group in groups if group.states)
    experts = any(group.label[1] for group in groups if group.states)
    wanted: dict[tuple[bool, bool, bool], list[int]] = {}
    for number, parameter in enumerate(parameters):
        label = (
            parameter.decays(query_key_norms=query_key_norms),
            experts and _EXPERT.fullmatch(parameter.key) is not None,
            apart and parameter.key in _ENDS,
        )
        wanted.setdefault(label, []).append(number)
    for order, group in enumerate(groups):
        if not group.states:
            continue
        name = f"group {order} (wd_mult {float(group.label[0])})"
        members = wanted.pop(group.label, None)
        if members is None or len(members) != len(group.states):
            raise Unplaced(
                f"{name} has {len(group.states)} parameters, and the model has "
                f"{len(members or ())} of its kind that are not in groups before it"
            )
        for number, state in zip(members, group.states, strict=True):
            for kind in kinds:
                _check_state(state.get(kind), parameters[number], f"{kind} in {name}")
                yield kind, number, state[kind]
        if group.masters is None:
            continue
        halves = [number for number in members if parameters[number].dtype in HALVES]
        if len(halves) != len(group.masters):
            raise Unplaced(
                f"{name} has {len(group.masters)} master copies, and the model {len(halves)} of "
                "its parameters in 16 bits"
            )
        for number, master in zip(halves, group.masters, strict=True):
            _check_state(master, parameters[number], f"master copy in {name}")
            yield MASTER, number, master
    if wanted:
        first = parameters[next(iter(wanted.values()))[0]].key
        raise Unplaced(f"no group has parameters like {first}")


def _check_state(state: Any, parameter: Parameter, what: str) -> None:
    if not isinstance(state, StoredTensor):
        raise Unplaced(f"there is no {what} in the place of {parameter.key}")
    if state.shape != parameter.shape:
        raise Unplaced(
            f"the {what} in the place of {parameter.key} {list(parameter.shape)} has shape "
            f"{list(state.shape)}"
        )


def order_of(name: str) -> tuple[int, int, int, int, str, int]:
    """A key that sorts the parameters of a model chunk as its `named_parameters()` does.

    Raises:
        CheckpointError: Megatron's GPT model has no such parameter.
    """
    layer = _LAYER.fullmatch(name)
    number, inside = (int(layer[2]), layer[3]) if layer is not None else (-1, name)
    module, _, part = inside.rpartition(".")
    which, projection = -1, ""
    expert = _LOCAL_EXPERT.fullmatch(module)
    if expert is not None:
        module, which, projection = "mlp.experts", int(expert[1]), expert[2]
    modules = _LAYER_MODULES if layer is not None else _MODULES
    if module not in modules or part not in _PARTS:
        raise CheckpointError(f"{name} has no known place in Megatron's GPT model")
    outer = modules.index(module) if layer is None else _MODULES.index(f"{layer[1]}.layers")
    return outer, number, modules.index(module), which, projection, _PARTS.index(part)
