"""The registry of formats: one line each says where its module is and how a path is recognised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from holdfast.checkpoint.convert.sources import (
    is_dcp,
    is_deepspeed,
    is_holdfast,
    is_hugging_face,
    is_megatron,
    is_universal,
)
from holdfast.parallel.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from holdfast.checkpoint.convert.elements import Output
    from holdfast.checkpoint.convert.sources import Catalog, ReadOptions, WriteOptions


class FormatModule(Protocol):
    """The module of a format. One that is only read has no `plan`."""

    def read(self, path: Path, options: ReadOptions) -> Catalog:
        """The catalog of a checkpoint in this format; content is read later."""
        ...

    def plan(self, catalog: Catalog, options: WriteOptions) -> Output:
        """The files of a checkpoint of the format with what a catalog has."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """A format of checkpoints."""

    module: str
    """Its module in this folder, imported on demand: a conversion needs one or two."""
    recognises: Callable[[Path], bool] | None = None
    """Whether a path holds a checkpoint of the format; None: the user names the format."""
    is_written: bool = True
    """Whether it can be the format of an output."""


FORMATS: Final[Mapping[str, Format]] = {
    "holdfast": Format("holdfast", is_holdfast),
    "megatron": Format("megatron.torch_dist", is_megatron),
    "megatron-legacy": Format("megatron.legacy"),
    "deepspeed": Format("deepspeed.zero", is_deepspeed, is_written=False),
    "deepspeed-universal": Format("deepspeed.universal", is_universal),
    "dcp": Format("dcp", is_dcp),
    "hf": Format("huggingface", is_hugging_face),
    "files": Format("files", is_written=False),
}
"""By the name that --from and --to give, in the order in which a path is tried: the most specific
first."""


def sources() -> tuple[str, ...]:
    """The formats that are read."""
    return tuple(FORMATS)


def targets() -> tuple[str, ...]:
    """The formats that are written."""
    return tuple(name for name, form in FORMATS.items() if form.is_written)


def recognise(path: Path) -> str | None:
    """The name of the format at a path; None if there is none."""
    found = ((name, form.recognises) for name, form in FORMATS.items())
    return next((name for name, recognises in found if recognises and recognises(path)), None)


def format_named(name: str) -> FormatModule:
    """The module of a format.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in FORMATS:
        raise ConfigError(unknown_name("--from", name, FORMATS))
    module = import_module(f"holdfast.checkpoint.convert.formats.{FORMATS[name].module}")
    return cast("FormatModule", module)
