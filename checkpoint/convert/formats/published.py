"""Published model folders: which files transformers would load, and what it passes over there."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import msgspec

from holdfast.checkpoint.convert.elements import SourceTensor, row_major
from holdfast.checkpoint.convert.rules import Rule, RuleBook, Skip
from holdfast.checkpoint.convert.sources import BIN_FILES, BIN_INDEX
from holdfast.checkpoint.format import ELEMENT_BYTES, INDEX
from holdfast.checkpoint.model_config import MODEL_TYPES, further_layers
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import open_regular

SINGLE, BIN_SINGLE = "model.safetensors", "pytorch_model.bin"
_ADAPTER = "adapter_model"
_HEAD, _EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight")
_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": _HEAD,
}
"""The weights that layers for the prediction of further tokens have in common with the model."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(?:safetensors|bin)")
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of a model folder that hold its weights."""

    names: tuple[str, ...] = ()
    index: str = ""
    """The file of JSON that names them; "" if there is none, or it does not count."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """The reason for each file of weights that does not count."""


def choose_files(root: Path) -> WeightFiles:
    """The files that transformers loads: a single file before an index, safetensors first.

    In a folder with none of its names, they are all safetensors files, or all of torch.save.

    Raises:
        CheckpointError: the folder holds an adapter of a model, and no model.
    """
    order = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX)
    there = [name for name in order if os.path.lexists(root / name)]
    if there:
        first, *others = there
        left_out = {name: f"transformers loads {first}, which is beside it" for name in others}
        if first in (SINGLE, BIN_SINGLE):
            return WeightFiles((first,), "", left_out)
        return WeightFiles((), first, left_out)
    for pattern in ("model*.safetensors", "*.safetensors", BIN_FILES):
        found = sorted(path.name for path in root.glob(pattern))
        if found and all(name.startswith(_ADAPTER) for name in found):
            raise CheckpointError(
                f"{root} holds an adapter ({found[0]}), which is no model; merge it into its base "
                "model (peft's merge_and_unload) and convert that"
            )
        if found:
            _check_numbers(root, found)
            return WeightFiles(tuple(found))
    return WeightFiles()


def _check_numbers(root: Path, names: Sequence[str]) -> None:
    """Refuse files that no index lists, and whose names say that there are more of them."""
    seen: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        if (found := _NUMBERED.fullmatch(name)) is not None:
            seen[found["stem"], found["count"]].add(int(found["number"]))
    for (stem, count), numbers in seen.items():
        if len(numbers) < int(count):
            raise CheckpointError(
                f"{root} has {len(numbers)} of the {int(count)} files {stem}-*-of-{count}.*, and "
                "no index; it is not completely copied"
            )


def published_rules(
    book: RuleBook, config: Mapping[str, Any], tensors: Sequence[SourceTensor], root: Path
) -> RuleBook:
    """The rules of the format, and what transformers passes over or renames for a model type.

    Computed buffers are left out, a base model's names get their prefix, and copies are left out:
    of a head that is equal to the embedding it is tied to, and of both in layers that predict
    further tokens.
    """
    keys = MODEL_TYPES.get(str(config.get("model_type")))
    if keys is None:
        return book
    skips = [Skip(name, "a buffer that the model computes by itself") for name in keys.buffers]
    numbers = {int(found[1]) for t in tensors if (found := _LAYER.match(t.key)) is not None}
    rules: list[Rule] = []
    names = {tensor.key: tensor for tensor in tensors}
    for number, (theirs, ours) in product(further_layers(config, numbers), _COPIES.items()):
        copy, first = names.get(f"model.layers.{number}.{theirs}"), names.get(ours)
        if copy and first and _same_content(root, first, copy):
            skips.append(Skip(copy.key, f"equal to {ours}, which the layer uses"))
    bare = any(name in names for name in _EMBEDDINGS)
    if bare and not any(name.startswith(keys.prefix) for name in names):
        rules = [
            Rule(source="lm_head.{name}", target="lm_head.{name}"),
            Rule(source="{name}", target=keys.prefix + "{name}"),
        ]
    tied = config.get("tie_word_embeddings", keys.honoured["tie_word_embeddings"])
    embedding = next(
        (names[p + n] for p in (keys.prefix, "") for n in _EMBEDDINGS if p + n in names), None
    )
    head = names.get(_HEAD)
    if tied and embedding and head and _same_content(root, embedding, head):
        skips.append(Skip(_HEAD, f"equal to {embedding.key}, to which config.json ties it"))
    return msgspec.structs.replace(book, skips=(*book.skips, *skips), rules=(*rules, *book.rules))


def _same_content(root: Path, first: SourceTensor, second: SourceTensor) -> bool:
    """Whether two tensors that lie in one piece each hold the same bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    places = [tensor.pieces[0].locations[0] for tensor in (first, second)]
    if any(place.strides != row_major(first.shape) for place in places):
        return False
    total = prod(first.shape) * ELEMENT_BYTES[first.dtype]
    if (places[0].file, places[0].offset) == (places[1].file, places[1].offset):
        return True
    with open_regular(root / places[0].file) as one, open_regular(root / places[1].file) as other:
        for start in range(0, total, _READ_BYTES):
            count = min(_READ_BYTES, total - start)
            a = os.pread(one.fileno(), count, places[0].offset + start)
            if a != os.pread(other.fileno(), count, places[1].offset + start):
                return False
    return True
