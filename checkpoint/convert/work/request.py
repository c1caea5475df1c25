"""The request of a conversion, and the plan that every process makes from it alike."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from holdfast.checkpoint.convert.elements import FLOATS, Output
from holdfast.checkpoint.convert.formats import format_named, recognise, sources, targets
from holdfast.checkpoint.convert.rules import load_rules, rules_text
from holdfast.checkpoint.convert.sources import Catalog, ReadOptions, WriteOptions, check_described
from holdfast.checkpoint.convert.work.journal import PARTIAL
from holdfast.parallel.errors import (
    CheckpointError,
    ConfigError,
    LayoutError,
    number_fault,
    shown,
    unknown_name,
)
from holdfast.parallel.reading import MALFORMED

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
    weights: str = ""
    """The kind of state that takes the weights' place: "ema"; "": none."""
    memory_bytes: int = MEMORY_BYTES
    """The memory for tensors under way in all workers, in bytes."""

    def __post_init__(self) -> None:
        """Take text for paths, as other functions do."""
        for name in ("source", "target", "rules", "model_files"):
            if isinstance(found := getattr(self, name), str):
                object.__setattr__(self, name, Path(found))


def check(conversion: Conversion) -> None:
    """Refuse options that are wrong at first sight.

    Raises:
        ConfigError: a format or type is unknown, a number is out of its range, or the
            output folder is a link or not empty.
    """
    faults = [number_fault("memory_bytes", conversion.memory_bytes, 0)]
    faults += [number_fault(f"--value {n}", value, 0) for n, value in conversion.values.items()]
    if found := next(filter(None, faults), ""):
        raise ConfigError(found)
    if conversion.to not in targets():
        raise ConfigError(unknown_name("--to", conversion.to, targets()))
    if conversion.dtype and conversion.dtype not in FLOATS:
        raise ConfigError(
            f"the type {conversion.dtype} is not known; use one of {', '.join(FLOATS)}"
        )
    try:
        if conversion.target.is_symlink():
            raise ConfigError(f"{conversion.target} is a link; name the folder that it leads to")
        is_full = next(conversion.target.iterdir(), None) is not None
    except FileNotFoundError:
        is_full = False
    except NotADirectoryError as error:
        raise ConfigError(f"{conversion.target} is no folder; name another one") from error
    except OSError as error:
        raise ConfigError(f"{conversion.target} cannot be read: {error.strerror}") from error
    if is_full:
        raise ConfigError(
            f"{conversion.target} exists and is not empty; name another folder, or remove this one "
            "first"
        )
    # Path.resolve has an error of its own for links in a circle.
    source, target = (Path(os.path.realpath(p)) for p in (conversion.source, conversion.target))
    if target == source or (target.is_relative_to(source) and source.is_file()):
        raise ConfigError(f"{conversion.target} lies in the source")


@dataclass(frozen=True, slots=True)
class PreparedConversion:
    """A conversion with opened source and planned output."""

    catalog: Catalog
    output: Output
    fingerprint: Mapping[str, Any]

    @property
    def total(self) -> int:
        return sum(unit.bytes for unit in self.output.units)


def prepare(conversion: Conversion) -> PreparedConversion:
    """Open the source and plan the output.

    Raises:
        ConfigError: the source is missing or has no known format, or rules or values are wrong.
        CheckpointError: the source is damaged or incomplete, or the target's format cannot hold it.
    """
    name = conversion.source_format
    if name == "auto" and conversion.rules is not None and load_rules(conversion.rules).files:
        name = "files"
    try:
        os.stat(conversion.source)
        if name == "auto":
            name = recognise(conversion.source) or ""
    except FileNotFoundError:
        raise ConfigError(f"{conversion.source} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        place = getattr(error, "filename", None) or conversion.source
        raise ConfigError(f"{place} cannot be read: {reason}") from error
    if not name:
        raise ConfigError(
            f"{conversion.source} is no checkpoint of a known format ({', '.join(sources())}); "
            "name its format with --from, or say with --map RULES.toml which of its tensors "
            "are what (docs/convert.md)"
        )
    options = ReadOptions(conversion.rules, conversion.values, conversion.model_files)
    try:
        catalog = format_named(name).read(conversion.source, options)
        check_described(catalog)
        output = format_named(conversion.to).plan(catalog, _write_options(conversion, catalog))
    except OSError as error:
        place = error.filename or conversion.source
        raise CheckpointError(f"{place} cannot be read: {error.strerror or error}") from error
    except (ConfigError, LayoutError):
        raise
    except MALFORMED as error:
        # What other programs pickle has no schema: any part of it can be of any type.
        raise CheckpointError(
            f"{conversion.source} is not as its format, {name!r}, has it: "
            f"{type(error).__name__}: {shown(str(error))}"
        ) from error
    return PreparedConversion(catalog, output, _fingerprint(conversion, catalog, output))


def _write_options(conversion: Conversion, catalog: Catalog) -> WriteOptions:
    """The options of the output, once another kind of state has taken the weights' place."""
    trained = catalog.take_for_weights(conversion.weights) if conversion.weights else ""
    return WriteOptions(conversion.dtype or trained, conversion.values)


def _fingerprint(conversion: Conversion, catalog: Catalog, output: Output) -> dict[str, Any]:
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
        "to": conversion.to,
        "dtype": conversion.dtype,
        **({"weights": conversion.weights} if conversion.weights else {}),
        "values": dict(conversion.values),
        "model_files": str(conversion.model_files or ""),
        "rules": rules_text(conversion.rules) if conversion.rules is not None else "",
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "output": output.files,
        "units": len(output.units),
    }


def partial_of(conversion: Conversion) -> Path:
    """The output's folder until it is finished."""
    return conversion.target.with_name(conversion.target.name + PARTIAL)
