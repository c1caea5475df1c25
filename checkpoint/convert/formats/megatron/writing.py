"""The writer of Megatron-Core's torch_dist folders, which its GPT model loads in any layout."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import FLOATS, LogicalTensor, Output
from holdfast.checkpoint.convert.formats.megatron.further import further_count, with_further
from holdfast.checkpoint.convert.formats.megatron.models import EMBEDDINGS, arguments_of
from holdfast.checkpoint.convert.formats.megatron.optimizer_order import HALVES
from holdfast.checkpoint.convert.formats.megatron.state_names import key_of_state
from holdfast.checkpoint.convert.formats.megatron.tokens import told_vocabulary
from holdfast.checkpoint.convert.formats.megatron.unlike import odd_settings
from holdfast.checkpoint.convert.rules import (
    RuleBook,
    Typed,
    builtin_rules,
    find_values,
    map_back,
    state_name,
)
from holdfast.checkpoint.convert.sources import (
    MEGATRON_TRACKER,
    Catalog,
    WriteOptions,
    choose_output_dtypes,
    files_for,
)
from holdfast.checkpoint.convert.writing import DistcpFolder, torch_file, write_files
from holdfast.checkpoint.format import BUFFER, WEIGHT, full_name
from holdfast.checkpoint.stores import write_synced
from holdfast.parallel.errors import CheckpointError, ConfigError, unknown_name
from holdfast.parallel.optimizer import MASTER, OPTIMIZERS
from holdfast.parallel.reading import parse_json

NAME = "megatron"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CONTENT = {
    "singleton_local_shards": False,
    "non_homogeneous_layers": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}
"""Tells Megatron the forms in which tensors are kept."""
_LINEAR = re.compile(
    r"(?P<module>(?:decoder|mtp)\.layers\..*(?:\.linear_(?:qkv|fc1|fc2|(?:q_|kv_)?(?:down_|up_)?proj)"
    r"|\.eh_proj))\.weight"
)
_LAST_OF_ATTENTION = (".linear_qkv", ".linear_kv_up_proj")
"""The linear layers of which each attention has one."""
_ROUTER_BIAS = re.compile(r".*\.mlp\.gate\.e_score_correction_bias")
"""The names of routers' biases, which are no parameters in Megatron: no optimizer has them."""
_CHECKPOINT_VERSION = 3.0
_RATE, _DECAY = 1e-3, 0.01
"""The values of torch's AdamW, for a source without its own."""
DECAY_STYLES = {
    "cosine": "cosine",
    "constant": "constant",
    "inverse-sqrt": "inverse-square-root",
    "linear": "linear",
    "wsd": "WSD",
}
"""Megatron's `lr_decay_style` by the value of `optimizer.schedule`."""
_VALUES = {
    "num_attention_heads": "heads",
    "num_query_groups": "kv_heads",
    "kv_channels": "head_dim",
    "hidden_size": "hidden",
    "ffn_hidden_size": "intermediate",
}
"""The arguments that tell the values of rules."""


def plan(catalog: Catalog, options: WriteOptions) -> Output:
    """Plan a tracker file and one iteration, or a release where there is no optimizer state.

    The state is for the distributed optimizer unless the value `distributed_optimizer` is 0.

    Raises:
        CheckpointError: Megatron's GPT model lacks a tensor, or layers differ.
        ConfigError: a size of the model is unknown, or a value is out of its range.
    """
    distributed = options.values.get("distributed_optimizer", 1)
    if distributed not in (0, 1):
        raise ConfigError("--to megatron: --value distributed_optimizer is 1 (it is used) or 0")
    book = builtin_rules(NAME)
    chosen = choose_tensors(catalog, options, book, all_copies=bool(distributed))
    typed, trained = chosen.tensors, bool(chosen.kinds)
    arguments, values = find_arguments(catalog, book, options.values, chosen.weights())
    iteration = f"iter_{catalog.step:07d}" if trained else "release"
    folder = DistcpFolder(iteration)
    # A model whose layers differ has a key for each.
    apart = bool(arguments.get("multi_latent_attention"))
    joined = map_back(book, typed, values, "--to megatron", form="layers" if apart else "")
    joined = with_further(joined, arguments)
    for made in joined:
        name = made.tensor.name
        if made.kind == MASTER and not distributed:
            name = key_of_state(MASTER, made.weight)
        folder.add((name,), made.tensor, made.dtype)
    for key in _kernel_states([made.tensor for made in joined]):
        folder.add_object((key,), [None])
    common = beside_tensors(catalog, arguments, trained=trained)
    common["content_metadata"] = {**_CONTENT, "non_homogeneous_layers": apart}
    if trained and distributed:
        common["optimizer"] = _distributed_optimizer(catalog)
    elif trained:
        halves = any(t.kind == WEIGHT and out in HALVES for t, out in typed)
        fused = options.values.get("transformer_engine", 1) == 1
        kept = _torch_optimizer(catalog, counted=not fused)
        common["optimizer"] = {"optimizer": kept} if halves else kept
    files = files_for(catalog, typed)

    def finish(root: Path, checksums: Sequence[int]) -> None:
        folder.write(root, checksums)
        write_files(root / iteration, files)
        write_synced(root / iteration / "common.pt", torch_file(common))
        write_synced(root / iteration / "metadata.json", json.dumps(_BACKEND).encode())
        told = str(catalog.step) if trained else "release"
        write_synced(root / MEGATRON_TRACKER, told.encode())

    return Output(folder.files, folder.units, finish, typed, "crc32")


@dataclass(frozen=True, slots=True)
class ChosenTensors:
    """The tensors of a source that Megatron gets."""

    tensors: list[Typed]
    """The weights and, if the optimizer was saved, master copies and states in 32 bits."""
    kinds: tuple[str, ...]
    """The kinds of the states; none if the optimizer was not saved."""

    def weights(self) -> dict[str, LogicalTensor]:
        """The weights by name."""
        return {tensor.name: tensor for tensor, _ in self.tensors if tensor.kind == WEIGHT}


def choose_tensors(
    catalog: Catalog, options: WriteOptions, book: RuleBook, *, all_copies: bool
) -> ChosenTensors:
    """Choose the tensors to write; `catalog.left_out` gets the others.

    Args:
        all_copies: include copies of 32-bit weights, as the distributed optimizer has them.
    Raises:
        CheckpointError: there are no weights, or only some weights have a kind of state.
    """
    typed = choose_output_dtypes(catalog, options.dtype, masters=True)
    unfit = {tensor.kind for tensor in catalog.states() if tensor.dtype not in FLOATS}
    named = (kind for kind in catalog.state_kinds() if state_name(book, kind) is not None)
    kinds = tuple(kind for kind in named if kind not in unfit)
    states = {tensor.full_name for tensor in catalog.states()}
    typed = [(_as_weight(tensor), out) for tensor, out in typed]
    fine = {tensor.name: tensor for tensor, _ in typed if tensor.kind == MASTER}
    kept: list[Typed] = []
    for tensor, out in typed:
        if tensor.kind == WEIGHT:
            kept.append((tensor, out))
            if kinds and (all_copies or out in HALVES) and not _is_router_bias(tensor):
                finest = fine.get(tensor.name, tensor)
                kept.append((replace(finest, kind=MASTER), "F32"))
        elif tensor.kind in kinds and tensor.full_name in states and not _is_router_bias(tensor):
            kept.append((tensor, "F32"))
        elif tensor.kind != MASTER:
            catalog.left_out[tensor.full_name] = f"{NAME} has no place for {tensor.kind}"
    written = {tensor.full_name for tensor, _ in kept}
    for tensor in fine.values():
        if tensor.full_name not in written:
            catalog.left_out[tensor.full_name] = f"{NAME} has {MASTER} values beside states only"
    chosen = ChosenTensors(kept, kinds)
    if not chosen.weights():
        raise CheckpointError(f"{catalog.root} holds no weights")
    trained = [name for name, own in chosen.weights().items() if not _is_router_bias(own)]
    for kind, name in product(kinds, trained):
        if full_name(kind, name) not in states:
            raise CheckpointError(
                f"{catalog.root} has {kind} of some weights, and none of {name}; Megatron's "
                "optimizers keep the same of every weight. Convert it to hf first, which leaves "
                "them out"
            )
    return chosen


def _is_router_bias(tensor: LogicalTensor) -> bool:
    return _ROUTER_BIAS.fullmatch(tensor.name) is not None


def _as_weight(tensor: LogicalTensor) -> LogicalTensor:
    """The tensor, as a weight if it is a router's bias that is saved as a buffer."""
    is_buffer = tensor.kind == BUFFER and _is_router_bias(tensor)
    return replace(tensor, kind=WEIGHT) if is_buffer else tensor


def _kernel_states(tensors: Sequence[LogicalTensor]) -> Iterator[str]:
    """The keys of the kernels' extra state, one per layer (and expert); Megatron needs all of them.

    The values are empty without FP8. Transformer Engine has them for its attention too.
    """
    for tensor in tensors:
        found = _LINEAR.match(tensor.name)
        if found is None:
            continue
        module = found["module"]
        modules = [module]
        if module.endswith(_LAST_OF_ATTENTION):
            modules.append(f"{module.rpartition('.')[0]}.core_attention")
        extents = tensor.shape[:-2] or (1,)
        for index in product(*map(range, extents)):
            place = f"{'.'.join(map(str, index))}_{'.'.join(map(str, extents))}"
            for module in modules:
                yield f"{module}._extra_state/shard_{place}"


def find_arguments(
    catalog: Catalog,
    book: RuleBook,
    given: Mapping[str, int],
    weights: Mapping[str, LogicalTensor],
    shards: int = 1,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The description of a model: (Megatron's command-line arguments, the values of rules).

    Args:
        given: values from the user.
        weights: the weights by name.
        shards: the number of ranks for which the vocabulary is padded.
    """
    config = parse_json(catalog.files.get("config.json", b"{}"))
    odd = list(odd_settings(config))
    if odd:
        raise CheckpointError(
            f"{catalog.root}: Megatron's arguments have no words for this in config.json: "
            f"{'; '.join(odd)}; if the model computes the same without it, say so with "
            "--model-files and a config.json that lacks it"
        )
    arguments: dict[str, Any] = dict(catalog.scalars.get(NAME, {}).get("args", {}))
    try:
        arguments |= arguments_of(config)
    except KeyError as error:
        raise CheckpointError(f"{catalog.root}: config.json lacks {error.args[0]}") from error
    if "untie_embeddings_and_output_weights" in arguments:
        # A head that differs from the embedding is one of its own, whatever config.json says.
        arguments["untie_embeddings_and_output_weights"] = "lm_head.weight" in weights
    if "mtp_num_layers" in arguments:
        # transformers saves a model without the layers that its config.json tells of.
        arguments["mtp_num_layers"] = further_count(weights, arguments) or None
    if arguments.get("num_query_groups"):
        arguments["query_groups"] = arguments["num_query_groups"]
    values = find_values(book, {"args": arguments, "config": config}, given)
    for name, value in _VALUES.items():
        if value in values:
            arguments[name] = values[value]
    arguments.setdefault("make_vocab_size_divisible_by", values["vocab_multiple"])
    embedding = next((weights[name] for name in EMBEDDINGS if name in weights), None)
    if embedding is not None and embedding.shape:
        values["vocab"] = embedding.shape[0]
        arguments["vocab_size"] = told_vocabulary(arguments, embedding.shape[0])
        # Each rank has a multiple of this, as in Megatron.
        multiple = values["vocab_multiple"] = values["vocab_multiple"] * shards
        arguments["padded_vocab_size"] = -(-embedding.shape[0] // multiple) * multiple
    arguments.pop("query_groups", None)
    return arguments, values


def beside_tensors(
    catalog: Catalog, arguments: Mapping[str, Any], *, trained: bool
) -> dict[str, Any]:
    """The values that Megatron keeps beside tensors, for one rank unless the arguments differ."""
    samples = int(catalog.scalars.get("samples", 0))
    told = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        **arguments,
        "iteration": catalog.step,
        "consumed_train_samples": samples,
        "no_save_optim": not trained,
        # The states of random generators are absent.
        "no_save_rng": True,
    }
    common: dict[str, Any] = {
        "args": argparse.Namespace(**told),
        "checkpoint_version": _CHECKPOINT_VERSION,
        "iteration": catalog.step if trained else 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": _CONTENT,
    }
    if trained:
        common["opt_param_scheduler"] = scheduler_state(catalog, samples)
    return common


def scheduler_state(catalog: Catalog, samples: int) -> dict[str, Any]:
    """The state of Megatron's schedule (learning rate, weight decay), from the source or its run.

    Raises:
        CheckpointError: Megatron has no counterpart of the run's schedule.
    """
    kept = catalog.scalars.get(NAME, {}).get("opt_param_scheduler")
    if kept:
        return dict(kept)
    config, train = catalog.config.get("optimizer", {}), catalog.config.get("train", {})
    decay, batch = config.get("weight_decay", _DECAY), train.get("global_batch", 1)
    step = optimizer_step(catalog)
    schedule = config.get("schedule", "constant")
    if schedule not in DECAY_STYLES:
        raise CheckpointError(
            f"the run's {unknown_name('optimizer.schedule', schedule, DECAY_STYLES)}; Megatron has "
            "no other schedule of ours"
        )
    if odd := _odd_schedule(config, schedule):
        raise CheckpointError(f"the run's {odd}; convert it to hf, which leaves the schedule out")
    return {
        "max_lr": config.get("lr", _RATE),
        "min_lr": config.get("min_lr", 0.0),
        "lr_warmup_steps": config.get("warmup_steps", 0) * batch,
        "lr_decay_steps": train.get("steps", step) * batch,
        "lr_decay_style": DECAY_STYLES[schedule],
        "num_steps": samples or step * batch,
        "start_wd": decay,
        "end_wd": decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": train.get("steps", step) * batch,
    }


def _odd_schedule(config: Mapping[str, Any], schedule: str) -> str:
    """What Megatron's schedule of that name has no words for; empty if there is nothing. Pure."""
    if schedule == "inverse-sqrt" and not config.get("warmup_steps"):
        return (
            "optimizer.schedule = 'inverse-sqrt' has no warm-up, which Megatron's begins to fall at"
        )
    if config.get("lr_stages"):
        return "optimizer.lr_stages are several schedules, and Megatron has one"
    if config.get("decay_steps") and schedule != "wsd":
        return (
            f"optimizer.decay_steps = {config['decay_steps']} end the schedule {schedule!r}, and "
            "Megatron's has no end but that of 'wsd'"
        )
    return ""


def optimizer_step(catalog: Catalog) -> int:
    """The number of steps that the optimizer has done."""
    return int(catalog.scalars.get("optimizer_step", catalog.step))


def parameter_groups(catalog: Catalog) -> list[dict[str, Any]]:
    """Megatron's groups of parameters, in its order: those with weight decay, and the others.

    Their settings come from the source's groups, or else from its run.
    """
    kept = [dict(group) for group in catalog.scalars.get(NAME, {}).get("param_groups") or ()]
    if any(group.get("default_config") is False or group.get("is_decoupled_lr") for group in kept):
        catalog.left_out["param_groups"] = (
            "those with a learning rate of their own; parameters are written in two groups, with "
            "weight decay and without"
        )
    catalog.leave_out_groups()
    config = catalog.config.get("optimizer", {})
    decay, rate = config.get("weight_decay", _DECAY), config.get("lr", _RATE)
    adam = catalog.has_states_of(OPTIMIZERS["adamw"])
    usual: dict[str, Any] = {"lr": rate}
    if adam:
        usual |= {"betas": config.get("betas", (0.9, 0.999)), "eps": config.get("eps", 1e-8)}
    usual |= {
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
        "max_lr": rate,
        "min_lr": config.get("min_lr", 0.0),
    }
    if adam:
        usual["bias_correction"] = True
    elif not kept:
        catalog.left_out["param_groups"] = (
            "settings of the optimizer beside lr and weight_decay: Megatron's names of them are "
            "not known"
        )
    groups = []
    for multiple in (1.0, 0.0):
        own = next(
            (
                group
                for group in kept
                if group.get("wd_mult") == multiple and group.get("default_config") is not False
            ),
            {},
        )
        group: dict[str, Any] = {"wd_mult": multiple, "weight_decay": decay * multiple}
        group |= {**usual, **own}
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
        groups.append({**group, "step": optimizer_step(catalog)})
    return groups


def _torch_optimizer(catalog: Catalog, *, counted: bool) -> dict[str, Any]:
    """The values that torch's optimizer keeps beside tensors.

    `counted`: each parameter gets its step count too.
    """
    return {
        "param_groups": parameter_groups(catalog),
        "state": {"common_step": optimizer_step(catalog)} if counted else {},
    }


def _distributed_optimizer(catalog: Catalog) -> dict[str, Any]:
    return {
        "optimizer": _torch_optimizer(catalog, counted=True),
        "param_state_sharding_type": _CONTENT["distrib_optim_sharding_type"],
    }
