"""Megatron-Core's checkpoints: torch_dist folders, and the older folders of one file a rank (mp_rank_XX_YYY)."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.catalog import Catalog, ReadOptions, make_catalog
from holdfast.checkpoint.convert.formats.dcp import read_items
from holdfast.checkpoint.convert.formats.megatron_models import EMBEDDINGS, describe
from holdfast.checkpoint.convert.formats.megatron_writing import NAME, plan
from holdfast.checkpoint.convert.pickles import StoredTensor, plain
from holdfast.checkpoint.convert.pieces import SourceTensor
from holdfast.checkpoint.convert.recognition import (
    DCP_METADATA,
    MEGATRON_FILE,
    MEGATRON_RANK,
    MEGATRON_TRACKER,
    is_torch_dist,
)
from holdfast.checkpoint.convert.torch_files import TorchFile, read_torch_file
from holdfast.parallel.errors import CheckpointError

__all__ = ["NAME", "plan", "read"]
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")
_COMMON = re.compile(r"common_state(/shard_.*)?")


def find_iteration(path: Path) -> Path:
    """The folder of one save: the path itself, or what the tracker file in it names.

    Raises:
        CheckpointError: the tracker names a folder that is not there.
    """
    tracker = path / MEGATRON_TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text().strip()
    folder = path / ("release" if text == "release" else f"iter_{int(text or -1):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker} names {text!r}, and there is no {folder.name}")
    return folder


def _ranks(path: Path) -> dict[tuple[int, int], str]:
    """The folders of ranks, by (tensor-parallel rank, pipeline stage)."""
    found: dict[tuple[int, int], str] = {}
    for folder in sorted(path.iterdir()) if path.is_dir() else ():
        match = MEGATRON_RANK.fullmatch(folder.name)
        if match is None or not (folder / MEGATRON_FILE).is_file():
            continue
        if match[3]:
            raise CheckpointError(
                f"{path} has experts in files of their own ({folder.name}), which cannot be converted; save "
                "it with --ckpt-format torch_dist"
            )
        found[int(match[1]), int(match[2] or 0)] = folder.name
    return found


def read(path: Path, options: ReadOptions) -> Catalog:
    """The tensors of a save of either form.

    Raises:
        CheckpointError: a file is missing, truncated or refused.
        ConfigError: a size that the rules need is not told by the checkpoint's arguments.
    """
    root = find_iteration(path)
    if is_torch_dist(root):
        return _read_torch_dist(root, options)
    return _read_legacy(root, options)


def _read_torch_dist(root: Path, options: ReadOptions) -> Catalog:
    backend = json.loads((root / "metadata.json").read_text())["sharded_backend"]
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
    catalog = make_catalog(NAME, root, tensors, options, told={"args": arguments})
    catalog.step = int(common.get("iteration", arguments.get("iteration") or 0))
    if "config.json" not in catalog.files:
        weights = {tensor.name: tensor for tensor in catalog.of_kind("weight")}
        embedding = next((weights[name] for name in EMBEDDINGS if name in weights), None)
        rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
        described = describe(arguments, rows, weights) if rows else None
        if described is not None:
            catalog.files["config.json"] = (json.dumps(described, indent=2) + "\n").encode()
    catalog.scalars = {
        "optimizer_step": catalog.step,
        "samples": int(arguments.get("consumed_train_samples") or 0),
        NAME: {"args": arguments, "iteration": catalog.step},
    }
    return catalog


def _read_legacy(root: Path, options: ReadOptions) -> Catalog:
    ranks = _ranks(root)
    if not ranks:
        raise CheckpointError(f"{root} holds neither a torch_dist checkpoint nor mp_rank folders")
    tensor = 1 + max(index for index, _ in ranks)
    pipeline = 1 + max(stage for _, stage in ranks)
    files: dict[tuple[int, int], TorchFile] = {}
    for index in range(tensor):
        for stage in range(pipeline):
            if (index, stage) not in ranks:
                raise CheckpointError(
                    f"{root} lacks the folder of tensor-parallel rank {index} at pipeline stage {stage}; it "
                    f"was saved by {tensor} x {pipeline}"
                )
            name = f"{ranks[index, stage]}/model_optim_rng.pt"
            files[index, stage] = read_torch_file(root, name)
    first = files[0, 0].content
    common = {"args": plain(first.get("args")), "iteration": first.get("iteration", 0)}
    told = common["args"] or {}
    for axis, found in (("tensor", tensor), ("pipeline", pipeline)):
        said = told.get(f"{axis}_model_parallel_size")
        if said and said != found:
            raise CheckpointError(
                f"{root} has the folders of {found} {axis}-parallel ranks, and its arguments say {said}"
            )
    tied = told.get("untie_embeddings_and_output_weights") is False
    chunks = [key for key in sorted(first) if re.fullmatch(r"model\d*", key)]
    depths = _depths(files, chunks, pipeline)
    tensors = []
    for (index, stage), file in files.items():
        for number, chunk in enumerate(chunks):
            before = sum(depths[n, s] for n, s in depths if (n, s) < (number, stage))
            tensors += _chunk(file, file.content.get(chunk) or {}, index, stage, before, tied)
    catalog = _catalog(root, tensors, common, options)
    for key in ("optimizer", "rng_state", "rerun_state_machine"):
        if first.get(key):
            catalog.left_out[key] = (
                "kept by place in Megatron's model; only torch_dist has names for it"
            )
    return catalog


def _depths(
    files: Mapping[tuple[int, int], TorchFile], chunks: list[str], pipeline: int
) -> dict[tuple[int, int], int]:
    """How many layers each model chunk has, by (chunk, stage): numbers in files begin with 0 in each."""
    found: defaultdict[tuple[int, int], int] = defaultdict(int)
    for number, chunk in enumerate(chunks):
        for stage in range(pipeline):
            for name in files[0, stage].content.get(chunk) or {}:
                layer = _LAYER.fullmatch(str(name))
                if layer is not None:
                    found[number, stage] = max(found[number, stage], int(layer[2]) + 1)
    return dict(found)


def _chunk(
    file: TorchFile, model: Mapping[str, Any], index: int, stage: int, before: int, tied: bool
) -> Iterator[SourceTensor]:
    for name, value in model.items():
        if not isinstance(value, StoredTensor):
            continue
        layer = _LAYER.fullmatch(name)
        if tied and name == "output_layer.weight":
            # The last stage's copy of the embedding.
            name = "embedding.word_embeddings.weight"
        elif layer is not None:
            name = f"{layer[1]}{int(layer[2]) + before}{layer[3]}"
        yield file.source(name, value, shard=(("tp", index), ("pp", stage)))
