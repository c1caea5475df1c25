"""The request of a conversion, and the plan that every process makes from it alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import FLOATS, Output
from holdfast.checkpoint.convert.formats import SOURCES, TARGETS, format_named
from holdfast.checkpoint.convert.rules import load_rules
from holdfast.checkpoint.convert.sources import Catalog, ReadOptions, WriteOptions, recognise
from holdfast.checkpoint.convert.work.journal import PARTIAL
from holdfast.parallel.errors import ConfigError

MEMORY_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a user asks for."""

    source: Path
    target: Path
    """A folder that does not exist yet, or is empty."""
    to: str
    source_format: str = "auto"
    dtype: str = ""
    """Of the weights, as safetensors names it; "" to leave it."""
    rules: Path | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    model_files: Path | None = None
    memory_bytes: int = MEMORY_BYTES
    """For what all workers have under way."""


def check(asked: Conversion) -> None:
    """Refuse what can be seen to be wrong at once.

    Raises:
        ConfigError: an unknown format or type, or an output folder that holds something.
    """
    if asked.to not in TARGETS:
        raise ConfigError(f"--to {asked.to}: use one of {', '.join(TARGETS)}")
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
    """A conversion that can begin."""

    catalog: Catalog
    output: Output
    fingerprint: Mapping[str, Any]

    @property
    def total(self) -> int:
        return sum(unit.bytes for unit in self.output.units)


def prepare(asked: Conversion) -> PreparedConversion:
    """Open the source and plan the output.

    Raises:
        ConfigError: the source does not exist, or is of no known format; wrong rules or values.
        CheckpointError: it is damaged or incomplete, or cannot be written in the target's format.
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
            f"{asked.source} is no checkpoint of a known format ({', '.join(SOURCES)}); name its "
            "format with --from"
        )
    options = ReadOptions(asked.rules, asked.values, asked.model_files)
    catalog: Catalog = format_named(name).read(asked.source, options)
    output: Output = format_named(asked.to).plan(catalog, WriteOptions(asked.dtype, asked.values))
    return PreparedConversion(catalog, output, _fingerprint(asked, catalog, output))


def _fingerprint(asked: Conversion, catalog: Catalog, output: Output) -> dict[str, Any]:
    """What must be equal for a conversion to go on from what another has left."""
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
    """Where the output is until it is finished."""
    return asked.target.with_name(asked.target.name + PARTIAL)
