"""The registry of formats, by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from holdfast.parallel.errors import ConfigError

_MODULES = {
    "holdfast": "holdfast",
    "megatron": "megatron.torch_dist",
    "megatron-legacy": "megatron.legacy",
    "deepspeed": "deepspeed.zero",
    "deepspeed-universal": "deepspeed.universal",
    "dcp": "dcp",
    "hf": "huggingface",
    "files": "files",
}
SOURCES = tuple(_MODULES)
TARGETS = ("holdfast", "hf", "dcp", "deepspeed-universal", "megatron", "megatron-legacy")


def format_named(name: str) -> Any:
    """The module of a format.

    Raises:
        ConfigError: there is no format of this name.
    """
    if name not in _MODULES:
        raise ConfigError(f"the format {name} is not known; use one of {', '.join(SOURCES)}")
    return import_module(f"holdfast.checkpoint.convert.formats.{_MODULES[name]}")
