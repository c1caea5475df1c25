"""The configuration of a run: read from TOML, overridden, checked, written back as resolved."""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from holdfast.parallel.errors import ConfigError, shown
from holdfast.parallel.optimizer import OPTIMIZERS, OwnKey
from holdfast.parallel.reading import converted, read_regular
from holdfast.trainer.config.choices import choice_problem
from holdfast.trainer.config.rules import problems_of
from holdfast.trainer.config.sections import OptimizerConfig, RunConfig
from holdfast.trainer.models import FAMILIES, ModelConfig, family_of

_MOST_BYTES = 2**20
"""The largest file that is read as a configuration."""
_GIVEN = re.compile(r"/dev/(stdin|fd/\d+)")
"""The names of files and pipes that the caller has opened for the command."""
_LONGEST_NAME = 60
"""The most characters of an unknown key's name that are shown."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check a configuration. Local; needs no torch.

    Args:
        path: the TOML file.
        overrides: "section.key=value", with the value as TOML or else as plain text.
    Raises:
        ConfigError: the configuration is wrong; the message has one line per problem: the key, its
            value, what is allowed.
    """
    table = _read_table(Path(path))
    for override in overrides:
        _override(table, override)
    config = convert_config(table)
    check_config(config)
    return config


def _read_table(source: Path) -> dict[str, Any]:
    try:
        if _GIVEN.fullmatch(str(source)):
            with source.open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
        else:
            content = read_regular(source, _MOST_BYTES)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{source} gives more than {_MOST_BYTES:,} bytes")
        # Some editors begin a file with a byte-order mark.
        return tomllib.loads(content.decode("utf-8").removeprefix("\ufeff"))
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}; name a TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, brackets 5,000 deep
        raise ConfigError(f"{source} is not valid TOML: {error}") from error


def convert_config(table: Mapping[str, Any]) -> RunConfig:
    """The configuration in a nested table of sections.

    Raises:
        ConfigError: a key is unknown (the message has the nearest known one) or missing, or a type
            is wrong.
    """
    sections = {field.name: field.type for field in msgspec.structs.fields(RunConfig)}
    chosen = {"model": _model_section(table), "optimizer": _optimizer_section(table)}
    sections |= chosen
    for name, keys in table.items():
        if name not in sections:
            raise ConfigError(f"[{_cut(name)}] is not a section{_nearest(name, sections)}")
        if not isinstance(keys, Mapping):
            raise ConfigError(
                f"{name} = {shown(keys)} is a key outside a section; write it as [{name}]"
            )
        known = [field.name for field in msgspec.structs.fields(sections[name])]
        for key in keys:
            if key not in known:
                raise ConfigError(f"{name}.{_cut(key)} is not a key{_nearest(key, known, name)}")
    try:
        return _converted(table, chosen)
    except msgspec.ValidationError as error:
        raise ConfigError(_explained(table, str(error))) from error


def _model_section(table: Mapping[str, Any]) -> type[ModelConfig]:
    """The struct of `[model]`, which depends on the family.

    Raises:
        ConfigError: no family has this name.
    """
    model = table.get("model")
    name = model.get("family") if isinstance(model, Mapping) else None
    if not isinstance(name, str):
        return ModelConfig  # converting it names what is missing or of a wrong type
    if problem := choice_problem("model.family", name, FAMILIES):
        raise ConfigError(problem)
    return family_of(name).section


def _optimizer_section(table: Mapping[str, Any]) -> type[OptimizerConfig]:
    """The struct of `[optimizer]`, with the own keys of the optimizer that it names."""
    section = table.get("optimizer")
    name = section.get("name", OptimizerConfig().name) if isinstance(section, Mapping) else None
    rule = OPTIMIZERS.get(name) if isinstance(name, str) else None
    return OptimizerConfig if rule is None else _with_keys(rule.own_keys)


@functools.cache
def _with_keys(keys: tuple[OwnKey, ...]) -> type[OptimizerConfig]:
    if not keys:
        return OptimizerConfig
    fields = [(key.name, key.type, key.default) for key in keys]
    made: Any = msgspec.defstruct(
        OptimizerConfig.__name__, fields, bases=(OptimizerConfig,), frozen=True, kw_only=True
    )
    return made


def _converted(table: Mapping[str, Any], chosen: Mapping[str, type[Any]]) -> RunConfig:
    """The typed form.

    Args:
        chosen: by name, the sections whose struct depends on one of their own keys.
    """
    bases: Mapping[str, type[Any]] = {"model": ModelConfig, "optimizer": OptimizerConfig}
    plain = dict(table)
    for name in chosen.keys() & table.keys():
        shared = {field.name for field in msgspec.structs.fields(bases[name])}
        plain[name] = {key: value for key, value in table[name].items() if key in shared}
    config = converted(plain, RunConfig)
    for name in chosen.keys() & table.keys():
        if chosen[name] is not bases[name]:
            whole: Any = msgspec.defstruct("Whole", [(name, chosen[name])])
            found = getattr(converted({name: table[name]}, whole), name)
            config = msgspec.structs.replace(config, **{name: found})
    return config


def check_config(config: RunConfig, world_size: int | None = None) -> None:
    """Check every rule that needs no file and no other process; equal on every rank.

    Args:
        world_size: the number of workers, if it is known.
    Raises:
        ConfigError: rules are broken; the message has one line for each.
    """
    problems = problems_of(config, world_size)
    if problems:
        raise ConfigError("\n".join(problems))


def dump_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML; `load_config` reads it back to an equal value."""
    lines: list[str] = []
    for section, keys in msgspec.to_builtins(config).items():
        lines.append(f"[{section}]")
        lines.extend(f"{key} = {_toml(value)}" for key, value in keys.items())
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _override(table: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if len(override) > _MOST_BYTES or re.search("[\ud800-\udfff]", override):
        raise ConfigError(f"--set {_cut(override)}: is not UTF-8 text, or more than 1 MiB")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"--set {_cut(override)}: write it as --set section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    table.setdefault(section, {})
    if not isinstance(table[section], dict):
        raise ConfigError(f"--set {_cut(override)}: {_cut(section)} is not a section")
    table[section] = {**table[section], key: value}


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…"


def _nearest(name: str, known: Collection[str], section: str = "") -> str:
    prefix = f"{section}." if section else ""
    near = difflib.get_close_matches(_cut(name), list(known), n=1, cutoff=0.4)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; known are {', '.join(known)}"


def _explained(table: Mapping[str, Any], message: str) -> str:
    """msgspec's message with the key in the file's spelling and the given value."""
    found = re.search(r" - at `\$\.?([^`]*)`", message)
    reason = message[: found.start()] if found else message
    path = found.group(1) if found else ""
    missing = re.search(r"missing required field `(\w+)`", reason)
    if missing:
        name = f"{path}.{missing.group(1)}" if path else f"[{missing.group(1)}]"
        return f"{name} is missing; it is required"
    value: Any = table
    for part in path.split("[")[0].split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if reason.startswith("Invalid enum value"):
        section, _, key = path.partition(".")
        fields = {f.name: f.type for f in msgspec.structs.fields(RunConfig)}
        kinds = {f.name: f.type for f in msgspec.structs.fields(fields[section])}
        if choices := getattr(kinds.get(key), "__args__", ()):
            return choice_problem(path, value, choices)
        reason = "not one of the choices"
    return f"{path} = {shown(value)}: {reason[0].lower()}{reason[1:]}"
