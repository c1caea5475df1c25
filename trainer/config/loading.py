"""The configuration of a run: read from TOML, overridden, checked, written back as resolved."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from holdfast.parallel.errors import ConfigError, shown
from holdfast.parallel.layout import AXES
from holdfast.parallel.optimizer import OPTIMIZERS, OwnKey
from holdfast.parallel.reading import converted, read_regular
from holdfast.trainer.config.choices import choice_problem
from holdfast.trainer.config.data_section import Removal, lacking_removals
from holdfast.trainer.config.model_folder import fill_from_folder
from holdfast.trainer.config.optimizer_section import OptimizerConfig
from holdfast.trainer.config.rules import problems_of
from holdfast.trainer.config.sections import RunConfig
from holdfast.trainer.config.suggestions import key_advice, lonely_advice, section_advice
from holdfast.trainer.config.vocabulary import default_vocab, vocab_problem
from holdfast.trainer.models import FAMILIES, ModelConfig, family_of

_MOST_BYTES = 2**20
"""The largest file that is read as a configuration."""
_GIVEN = re.compile(r"/dev/(stdin|fd/\d+)")
"""The names of files and pipes that the caller has opened for the command."""
_LONGEST_NAME = 60
"""The most characters of an unknown key's name that are shown."""


def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, workers: int | None = None
) -> RunConfig:
    """Read, override and check a configuration. Local; needs no torch.

    Args:
        path: the TOML file.
        overrides: "section.key=value", with the value as TOML or else as plain text.
        workers: the number of workers that are wanted; it decides parallel.data if that is not set.
    Raises:
        ConfigError: the configuration is wrong; the message has one line per problem: the key, its
            value, what is allowed.
    """
    table = _read_table(Path(path))
    for override in overrides:
        _override(table, override)
    fill_from_folder(table)
    config = convert_config(table)
    given = table.get("parallel", {})
    if workers is not None and "data" not in given:
        config = _with_workers(config, workers)
    check_config(config)
    # What follows from the tokenizer need not be compared with it: its file may be large.
    if table["model"].get("vocab") and (problem := vocab_problem(config.data, config.model.vocab)):
        raise ConfigError(problem)
    return config


def _with_workers(config: RunConfig, workers: int) -> RunConfig:
    """The configuration with as many replicas as make up the workers.

    Raises:
        ConfigError: the other axes do not divide them.
    """
    parallel = config.parallel
    replica = parallel.ranks // max(1, parallel.data)
    if replica < 1:
        return config  # an axis is refused
    if workers % replica:
        sizes = {axis: getattr(parallel, axis) for axis in AXES if axis != "data"}
        told = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise ConfigError(
            f"--nproc {workers}: a replica of {told} needs {replica} workers; start a multiple of "
            f"{replica}"
        )
    parallel = msgspec.structs.replace(parallel, data=workers // replica)
    return msgspec.structs.replace(config, parallel=parallel)


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
    """The configuration in a nested table of sections, with every size of the model set.

    Raises:
        ConfigError: a key is unknown (the message has the nearest known one) or missing, a type
            is wrong, or the tokenizer that gives `model.vocab` cannot be read.
    """
    chosen = {"model": _model_section(table), "optimizer": _optimizer_section(table)}
    sections = {**_sections(), **chosen}
    for name, keys in table.items():
        if name not in sections:
            advice = section_advice(_cut(name), sections)
            if isinstance(keys, Mapping):
                raise ConfigError(f"[{_cut(name)}] is not a section{advice}")
            name = _cut(name)
            raise ConfigError(f"{name} = {shown(keys)} is outside a section{lonely_advice(name)}")
        if not isinstance(keys, Mapping):
            raise ConfigError(
                f"{name} = {shown(keys)} is a key outside a section; write it as [{name}]"
            )
        known = sections[name].__struct_fields__
        for key in keys:
            if key not in known:
                advice = key_advice(name, _cut(key), known)
                raise ConfigError(f"{name}.{_cut(key)} is not a key{advice}")
        _check_tables(name, sections[name], keys)
    try:
        config = _converted(_with_lists(table), chosen)
    except msgspec.ValidationError as error:
        raise ConfigError(_explained(table, str(error), sections)) from error
    if config.model.vocab:
        return config
    model = msgspec.structs.replace(config.model, vocab=default_vocab(config.data))
    return msgspec.structs.replace(config, model=model)


@functools.cache
def _sections() -> Mapping[str, type[Any]]:
    """The struct of each section, by its name."""
    return {field.name: field.type for field in msgspec.structs.fields(RunConfig)}


def _check_tables(section: str, kind: type[Any], keys: Mapping[str, Any]) -> None:
    """Check that the lists of tables in a section have known keys.

    Raises:
        ConfigError: a key is unknown.
    """
    for listed, known in _tables_of(kind).items():
        rows = keys.get(listed)
        for number, row in enumerate(rows if isinstance(rows, list) else ()):
            for key in row if isinstance(row, Mapping) else ():
                if key not in known:
                    name = f"{section}.{listed}[{number}]"
                    raise ConfigError(
                        f"{name}.{_cut(key)} is not a key{key_advice(name, _cut(key), known)}"
                    )


@functools.cache
def _tables_of(kind: type[Any]) -> Mapping[str, tuple[str, ...]]:
    """The lists of tables in a section, each with the keys of its tables.

    Kept, because msgspec compiles every annotation again whenever it is asked for the fields.
    """
    found = {}
    for field in msgspec.structs.fields(kind):
        [row_kind] = getattr(field.type, "__args__", ())[:1] or [None]
        if known := getattr(row_kind, "__struct_fields__", ()):
            found[field.name] = known
    return found


def _with_lists(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table, where one path is the list of it."""
    data = table.get("data")
    if not isinstance(data, Mapping):
        return table
    listed = _with_list(data)
    if isinstance(sets := data.get("validation"), list):
        own = [_with_list(one) if isinstance(one, Mapping) else one for one in sets]
        listed = {**listed, "validation": own}
    return {**table, "data": listed}


def _with_list(table: Mapping[str, Any]) -> Mapping[str, Any]:
    path = table.get("path")
    return {**table, "path": [path]} if isinstance(path, str) else table


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
        shared = bases[name].__struct_fields__
        plain[name] = {key: value for key, value in table[name].items() if key in shared}
    config = converted(plain, RunConfig)
    for name in chosen.keys() & table.keys():
        if chosen[name] is not bases[name]:
            found = getattr(converted({name: table[name]}, _whole(name, chosen[name])), name)
            config = msgspec.structs.replace(config, **{name: found})
    return config


@functools.cache
def _whole(name: str, kind: type[Any]) -> Any:
    """A struct of one section, so that messages on its keys have the section's name."""
    return msgspec.defstruct("Whole", [(name, kind)])


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


def _explained(table: Mapping[str, Any], message: str, sections: Mapping[str, Any]) -> str:
    """msgspec's message with the key in the file's spelling and the given value.

    Args:
        sections: the struct of each section.
    """
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
        kinds = {f.name: f.type for f in msgspec.structs.fields(sections[section])}
        if choices := getattr(kinds.get(key), "__args__", ()):
            return choice_problem(path, value, choices)
        reason = "not one of the choices"
    if reason.startswith("Expected `array`"):
        reason = "expected a list, as in [1, 2]"
    return f"{path} = {shown(value)}: {reason[0].lower()}{reason[1:]}"


def removals_of(path: Path) -> list[Removal]:
    """The samples that the run of a configuration file trains without; none if it cannot be read.

    Args:
        path: the file in the folder of a run.
    """
    try:
        found = tomllib.loads(read_regular(path, _MOST_BYTES).decode())
        return converted(found["data"]["without"], list[Removal])
    except (OSError, ValueError, KeyError, TypeError, msgspec.ValidationError):
        return []


def with_removals(config: RunConfig, removals: Sequence[Removal]) -> RunConfig:
    """A configuration that removes these samples as well. Pure."""
    lacking = lacking_removals(config.data.without, removals)
    if not lacking:
        return config
    data = msgspec.structs.replace(config.data, without=[*config.data.without, *lacking])
    return msgspec.structs.replace(config, data=data)
