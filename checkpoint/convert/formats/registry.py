"""The formats by name, and which of them a path is."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from holdfast.parallel.errors import ConfigError

_MODULES = {
    "holdfast": "holdfast",
    "megatron": "megatron",
    "megatron-legacy": "megatron_legacy",
    "deepspeed": "deepspeed",
    "deepspeed-universal": "deepspeed_universal",
    "dcp": "dcp",
    "hf": "huggingface",
    "files": "files",
}
"""In the order in which a path is tried: the most particular first."""
SOURCES = tuple(_MODULES)
TARGETS = ("holdfast", "hf", "dcp", "deepspeed-universal", "megatron", "megatron-legacy")


def format_named(name: str) -> Any:
    """The module of a format.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in _MODULES:
        raise ConfigError(f"the format {name} is not known; use one of {', '.join(SOURCES)}")
    return import_module(f"holdfast.checkpoint.convert.formats.{_MODULES[name]}")


def recognise(path: Path) -> str:
    """The name of the format that a path has.

    Raises:
        ConfigError: it does not exist, or is of none.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    for name in _MODULES:
        if format_named(name).recognise(path):
            return name
    raise ConfigError(
        f"{path} is no checkpoint of a known format ({', '.join(SOURCES)}); name its format with --from"
    )
