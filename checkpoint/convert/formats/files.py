"""Files of torch.save and safetensors, described by `files` in the user's rules."""

from __future__ import annotations

import os
from pathlib import Path

from holdfast.checkpoint.convert.elements import SourceTensor
from holdfast.checkpoint.convert.formats.huggingface import read_safetensors
from holdfast.checkpoint.convert.rules import Pattern, load_rules
from holdfast.checkpoint.convert.sources import (
    Catalog,
    ReadOptions,
    make_catalog,
    read_torch_file,
    tensors_in,
)
from holdfast.parallel.errors import CheckpointError, ConfigError

NAME = "files"


def read(path: Path, options: ReadOptions) -> Catalog:
    """Read the tensors of all files that fit the rules' patterns, which give their coordinates.

    Raises:
        ConfigError: there are no rules, or they name no files.
        CheckpointError: no file fits, or a file is truncated or refused.
    """
    if options.rules is None:
        raise ConfigError(
            "--from files needs --map RULES.toml, whose `files` says which files there are"
        )
    book = load_rules(options.rules)
    patterns = [Pattern(text) for text in book.files]
    if not patterns:
        raise ConfigError(f"--map {options.rules}: it has no `files`, the patterns of file names")
    root = path if path.is_dir() else path.parent
    tensors: list[SourceTensor] = []
    for name in _names(root):
        found = next((m for p in patterns if (m := p.match(name)) is not None), None)
        if found is None:
            continue
        if not all(text.isdecimal() for text in found.values()):
            raise ConfigError(
                f"--map {options.rules}: captures of `files` must be digits: {{tp:d}}"
            )
        shard = tuple((axis, int(text)) for axis, text in found.items())
        tensors += _file(root, name, shard)
    if not tensors:
        raise CheckpointError(f"{root} has no file of tensors that fits {', '.join(book.files)}")
    return make_catalog(NAME, root, tensors, options)


def _names(root: Path) -> list[str]:
    found = []
    for folder, _, files in os.walk(root):
        found += [os.path.relpath(os.path.join(folder, name), root) for name in files]
    return sorted(found)


def _file(root: Path, name: str, shard: tuple[tuple[str, int], ...]) -> list[SourceTensor]:
    if name.endswith(".safetensors"):
        return [
            SourceTensor(t.key, t.dtype, t.shape, t.pieces, shard)
            for t in read_safetensors(root, name)
        ]
    file = read_torch_file(root, name)
    return [
        file.source("/".join(path), tensor, shard=shard)
        for path, tensor in tensors_in(file.content)
    ]
