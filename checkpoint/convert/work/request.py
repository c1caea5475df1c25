"""The request of a conversion, and the plan that every process makes from it alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import FLOATS, Output
from holdfast.checkpoint.convert.formats import format_named, recognise, sources, targets
from holdfast.checkpoint.convert.rules import load_rules
from holdfast.checkpoint.convert.sources import Catalog, ReadOptions, WriteOptions
from holdfast.checkpoint.convert.work.journal import PARTIAL
from holdfast.parallel.errors import ConfigError, unknown_name

MEMORY_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """The options of a conversion."""

    source: Path
    """The path of the checkpoint to convert."""
    target: Path
    """The output's folder: one that does not exist yet, or is empty."""
    to: str
    """The output's format: one of `formats.registry.targets`."""
    source_format: str = "auto"
    """The source's format; "auto" recognises it."""
    dtype: str = ""
    """The type of the weights, by safetensors' name; "" leaves it."""
    rules: Path | None = None
    """A TOML file of rules to use instead of the format's own."""
    values: Mapping[str, int] = field(default_factory=dict)
    """Values for the rules, by name."""
    model_files: Path | None = None
    """A folder with config.json and tokenizer files, for a source that has none."""
    memory_bytes: int = MEMORY_BYTES
    """The memory for tensors under way in all workers, in bytes."""


def check(asked: Conversion) -> None:
    """Refuse options that are wrong at first sight.

    Raises:
        ConfigError: a format or type is unknown, or the output folder is not empty.
    """
    if asked.to not in targets():
        raise ConfigError(unknown_name("--to", asked.to, targets()))
    if asked.dtype and asked.dtype not in FLOATS:
        raise ConfigError(f"the type {asked.dtype} is not known; use one of {', '.join(FLOATS)}")
    if asked.target.exists() and (not asked.target.is_dir() or any(asked.target.iterdir())):
        raise ConfigError(
            f"{asked.target} exists and is not empty; name another folder, or remove it"
        )
    source, target = asked.source.resolve(), asked.target.resolve()
    if target == source or (target.is_relative_to(source) and source.is_file()):
        raise ConfigError(f"{asked.target} lies in the source")


@dataclass(frozen=True, slots=True)
class PreparedConversion:
    """A conversion with opened source and planned output."""

    catalog: Catalog
    output: Output
    fingerprint: Mapping[str, Any]

    @property
    def total(self) -> int:
        return sum(unit.bytes for unit in self.output.units)


def prepare(asked: Conversion) -> PreparedConversion:
    """Open the source and plan the output.

    Raises:
        ConfigError: the source is missing or has no known format, or rules or values are wrong.
        CheckpointError: the source is damaged or incomplete, or the target's format cannot hold it.
    """
    name = asked.source_format
    if name == "auto" and asked.rules is not None and load_rules(asked.rules).files:
        name = "files"
    if not asked.source.exists():
        raise ConfigError(f"{asked.source} does not exist")
    if name == "auto":
        name = recognise(asked.source) or ""
    if not name:
        raise ConfigError(
            f"{asked.source} is no checkpoint of a known format ({', '.join(sources())}); name its "
            "format with --from"
        )
    options = ReadOptions(asked.rules, asked.values, asked.model_files)
    catalog = format_named(name).read(asked.source, options)
    output = format_named(asked.to).plan(catalog, WriteOptions(asked.dtype, asked.values))
    return PreparedConversion(catalog, output, _fingerprint(asked, catalog, output))


def _fingerprint(asked: Conversion, catalog: Catalog, output: Output) -> dict[str, Any]:
    """The description that two conversions must share for one to resume the other."""
    files = {
        location.file
        for tensor, _ in output.expected
        for piece in tensor.pieces
        for location in piece.locations
    }
    stats = {file: (catalog.root / file).stat() for file in sorted(files)}
    return {
        "version": version("holdfast"),
        "source": str(catalog.root.resolve()),
        "from": catalog.format,
        "to": asked.to,
        "dtype": asked.dtype,
        "values": dict(asked.values),
        "model_files": str(asked.model_files or ""),
        "rules": asked.rules.read_text() if asked.rules is not None else "",
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "output": output.files,
        "units": len(output.units),
    }


def partial_of(asked: Conversion) -> Path:
    """The output's folder until it is finished."""
    return asked.target.with_name(asked.target.name + PARTIAL)
