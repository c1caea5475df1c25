"""Megatron-Core's checkpoints: the reader of torch_dist folders and of older, per-rank ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import SourceTensor
from holdfast.checkpoint.convert.formats.dcp import read_items
from holdfast.checkpoint.convert.formats.megatron.further import from_further
from holdfast.checkpoint.convert.formats.megatron.models import EMBEDDINGS, describe
from holdfast.checkpoint.convert.formats.megatron.optimizer_order import (
    groups_of,
    optimizers_of,
    torch_state,
)
from holdfast.checkpoint.convert.formats.megatron.ranks import read_ranks
from holdfast.checkpoint.convert.formats.megatron.tokens import token_count
from holdfast.checkpoint.convert.formats.megatron.unlike import odd_arguments
from holdfast.checkpoint.convert.formats.megatron.writing import NAME, plan
from holdfast.checkpoint.convert.sources import (
    DCP_METADATA,
    MEGATRON_TRACKER,
    Catalog,
    ReadOptions,
    check_described,
    config_of,
    is_torch_dist,
    make_catalog,
    plain,
    read_torch_file,
    torch_dist_backend,
)
from holdfast.checkpoint.format import WEIGHT
from holdfast.checkpoint.model_config import differing
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import read_name

__all__ = ["NAME", "plan", "read"]
_COMMON = re.compile(r"common_state(/shard_.*)?")


def find_iteration(path: Path) -> Path:
    """The folder of one save: the path itself, or the folder that the tracker file in it names.

    Raises:
        CheckpointError: the tracker names no iteration, or a missing folder.
        OSError: the tracker cannot be read.
    """
    tracker = path / MEGATRON_TRACKER
    if not tracker.is_file():
        return path
    text = read_name(tracker)
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise CheckpointError(f"{tracker} names {text!r}, which is no iteration")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker} names {text!r}, and there is no {folder.name}")
    return folder


def read(path: Path, options: ReadOptions) -> Catalog:
    """Read the tensors of a save of either form.

    Raises:
        CheckpointError: a file is missing, truncated or refused.
        ConfigError: the checkpoint's arguments lack a size that the rules need.
    """
    root = find_iteration(path)
    if is_torch_dist(root):
        return _read_torch_dist(root, options)
    saved = read_ranks(root)
    catalog = _catalog(root, saved.tensors, saved.common, options)
    catalog.left_out |= saved.left_out
    return catalog


def _read_torch_dist(root: Path, options: ReadOptions) -> Catalog:
    backend = torch_dist_backend(root)
    if backend != "torch_dist" or not (root / DCP_METADATA).is_file():
        raise CheckpointError(
            f"{root} is of Megatron's backend {backend!r}; torch_dist is supported"
        )
    items = read_items(root)
    common: dict[str, Any] = {}
    if (root / "common.pt").is_file():
        common = plain(read_torch_file(root, "common.pt").content)
    left_out = {}
    for name, value in items.objects.items():
        if _COMMON.fullmatch(name) and isinstance(plain(value), dict):
            common |= plain(value)
        elif not name.endswith("_extra_state") and "_extra_state/" not in name:
            left_out[name] = "an object of Megatron's own"
    catalog = _catalog(root, items.tensors, common, options)
    catalog.left_out |= left_out
    return catalog


def _catalog(
    root: Path, tensors: list[SourceTensor], common: Mapping[str, Any], options: ReadOptions
) -> Catalog:
    arguments = dict(common.get("args") or {})
    if arguments.get("num_attention_heads"):
        grouped = arguments.get("group_query_attention", True)
        own = arguments.get("num_query_groups") if grouped else None
        arguments["query_groups"] = own or arguments["num_attention_heads"]
    tensors = [replace(one, key=from_further(one.key, arguments)) for one in tensors]
    told = {"args": arguments, "tokens": {"vocab": token_count(arguments)}}
    catalog = make_catalog(NAME, root, tensors, options, told=told)
    catalog.step = int(common.get("iteration", arguments.get("iteration") or 0))
    if "config.json" not in catalog.files:
        odd = odd_arguments(arguments) if options.rules is None else []
        if odd:
            raise CheckpointError(
                f"{root}: Megatron's arguments describe a model that config.json cannot: "
                f"{'; '.join(odd)}; if a config.json of yours describes it, give its folder with "
                "--model-files"
            )
        weights = {tensor.name: tensor for tensor in catalog.of_kind(WEIGHT)}
        embedding = next((weights[name] for name in EMBEDDINGS if name in weights), None)
        rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
        described = describe(arguments, rows, weights) if rows else None
        if described is not None:
            catalog.files["config.json"] = (json.dumps(described, indent=2) + "\n").encode()
            check_described(catalog, "the model of Megatron's arguments, as config.json has it,")
    else:
        _check_alike(catalog, arguments)
    trained = common.get("optimizer") or {}
    catalog.scalars = {
        "optimizer_step": _steps(trained, catalog.step),
        "samples": int(arguments.get("consumed_train_samples") or 0),
        NAME: {"args": arguments, "iteration": catalog.step},
    }
    groups, schedule = groups_of(trained), common.get("opt_param_scheduler")
    if groups:
        catalog.scalars[NAME]["param_groups"] = groups
    if schedule:
        catalog.scalars[NAME]["opt_param_scheduler"] = schedule
    return catalog


def _check_alike(catalog: Catalog, arguments: Mapping[str, Any]) -> None:
    """Refuse a config.json that describes another model than Megatron's arguments.

    Raises:
        CheckpointError: they differ in a key that changes the function.
    """
    config = config_of(catalog)
    size, tokens = config.get("vocab_size"), token_count(arguments)
    if not isinstance(size, int):
        return
    described = describe(arguments, size, catalog.files, str(config.get("model_type")))
    if described is None:
        return
    # Which weights are tied, the weights tell.
    described["tie_word_embeddings"] = config.get("tie_word_embeddings")
    found = [
        f"{key} is {theirs!r}, and {own!r} by the arguments"
        for key, theirs, own in differing(config, described)
        if key != "tie_word_embeddings"
    ]
    if tokens is not None and isinstance(size, int) and size < tokens:
        found.append(f"vocab_size is {size}, and there are {tokens} tokens by the arguments")
    if found:
        raise CheckpointError(
            f"{catalog.root}: config.json describes another model than Megatron's arguments: "
            f"{'; '.join(found)}; correct it; without one it is made from the arguments"
        )


def _steps(optimizer: Any, iteration: int) -> int:
    """The number of steps that an optimizer has done: it may be less than the iterations."""
    for part in optimizers_of(optimizer):
        inner = torch_state(part)
        states = inner.get("state")
        counts = [states.get("common_step")] if isinstance(states, Mapping) else []
        counts += [group.get("step") for group in inner.get("param_groups", ())]
        for count in counts:
            if isinstance(count, int | float) and count:
                return int(count)
    return iteration
