"""The keys of a configuration that a Hugging Face folder gives (`model.from_hf`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from holdfast.checkpoint.format import expanded
from holdfast.checkpoint.model_config import read_config
from holdfast.parallel.errors import ConfigError, shown
from holdfast.parallel.reading import read_regular
from holdfast.trainer.models import FAMILIES, family_of

_TOKENIZER = "tokenizer.json"


def fill_from_folder(table: dict[str, Any]) -> None:
    """Set the keys of [model], and data.tokenizer, that a table leaves to its model.from_hf. Local.

    Args:
        table: of sections; it is changed. Keys that are set stay.
    Raises:
        ConfigError: the folder has no config.json, or that of a model of no family.
    """
    model = table.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("from_hf"), str):
        return
    if not model["from_hf"]:
        return
    folder = expanded(model["from_hf"], "model.from_hf")
    data = table.get("data")
    tokenizer = folder / _TOKENIZER
    is_text = isinstance(data, Mapping) and data.get("kind") == "text"
    if isinstance(data, Mapping) and is_text and "tokenizer" not in data and tokenizer.is_file():
        table["data"] = {**data, "tokenizer": str(tokenizer)}
    if _is_whole(model):
        return  # as a run has it, which needs the folder no more
    described = _described(folder)
    said = f"model.from_hf = {shown(str(folder))}"
    kind = described.get("model_type")
    family = family_of(kind) if isinstance(kind, str) and kind in FAMILIES else None
    if family is None or family.section_of is None:
        allowed = ", ".join(repr(name) for name in FAMILIES)
        raise ConfigError(f"{said}: its model_type is {shown(kind)}; allowed are {allowed}")
    try:
        found = {key: msgspec.to_builtins(v) for key, v in family.section_of(described).items()}
    except ValueError as error:
        raise ConfigError(f"{said}: its config.json: {error}") from error
    given = {key: value for key, value in found.items() if value is not None}
    table["model"] = {"family": kind, **given, **model}


def _is_whole(model: Mapping[str, Any]) -> bool:
    """Whether [model] has every key of its family's section."""
    name = model.get("family")
    if not isinstance(name, str) or name not in FAMILIES:
        return False
    return model.keys() >= {*family_of(name).section.__struct_fields__}


def _described(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return read_config(read_regular(path))
    except OSError as error:
        raise ConfigError(
            f"model.from_hf = {shown(str(folder))}: its config.json cannot be read: "
            f"{error.strerror}; name the folder of a Hugging Face model"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"model.from_hf = {shown(str(folder))}: its config.json cannot be read: {error}"
        ) from error
