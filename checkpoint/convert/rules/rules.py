"""The rules of a format, read from TOML; docs/convert.md explains them. Pure; needs no torch."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec

from holdfast.checkpoint.convert.rules.patterns import Pattern, evaluate
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.reading import converted, read_regular

_MOST_BYTES = 1 << 20
"""The largest file of rules, in bytes."""

Form = Literal["whole", "replicated", "shard", "sum", "mean"]


class RulePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the tensors that are fused into a source tensor."""

    target: str
    """The tensor's name in the model. Equal targets of several parts are joined in order."""
    size: int | str
    """The number of its indices along `fused_dim` in each group."""


class Strip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Padding: only the first `size` indices along `dim` belong to the tensor."""

    size: int | str
    dim: int = 0
    multiple: int | str = 1
    """When the format is written, zeros are added up to a multiple of this."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A rule for the source tensors whose names fit a pattern.

    It has a field for each word of a rule in the TOML files.
    """

    source: str
    target: str = ""
    """The tensor's name in the model; `parts` replaces it for fused tensors."""
    form: Form = msgspec.field(name="is", default="whole")
    over: str = "tp"
    """The axis of the shards. Along other axes, copies must be equal."""
    dim: int = 0
    """For shards, the dimension that is cut."""
    fragments: str = ""
    """The axis along which each shard, or the whole tensor, is kept as flat fragments."""
    stack: str | tuple[str, ...] = ()
    """The captures that the indices of the first dimensions become: those dimensions enumerate
    tensors."""
    strip: Strip | None = None
    parts: tuple[RulePart, ...] = ()
    groups: int | str = 1
    """How often the parts repeat along `fused_dim`; `shards` is the number of shards."""
    fused_dim: int = 0
    transpose: bool = False
    """Swap the last two dimensions."""
    if_source: str | tuple[str, ...] = ()
    """The rule holds only if the source has a tensor of this name, or of one of these; captures are
    those of `source`."""
    if_target: str = ""
    """When the format is written, the rule holds only if the model has a tensor of this name;
    captures are those of the target."""
    written: bool | tuple[str, ...] = True
    """Whether the rule is used for writing; or the forms of the format in which it is ("" for the
    usual one)."""

    def is_written(self, form: str) -> bool:
        """Whether the rule holds when a form of the format is written."""
        if isinstance(self.written, bool):
            return self.written and not form
        return form in self.written

    @property
    def stacked(self) -> tuple[str, ...]:
        """`stack` as a tuple of captures, one per dimension."""
        return (self.stack,) if isinstance(self.stack, str) else self.stack

    @property
    def conditions(self) -> tuple[str, ...]:
        """`if_source` as a tuple of names."""
        return (self.if_source,) if isinstance(self.if_source, str) else self.if_source

    @property
    def targets(self) -> tuple[str, ...]:
        """The patterns of the tensors that the rule gives, each once."""
        return tuple(dict.fromkeys(part.target for part in self.parts)) or (self.target,)


class StateRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule for the names of other tensors than weights, made from the names of weights."""

    source: str
    """A pattern with a capture {key}: the weight's name, to which the rules apply."""
    kind: str
    """The kind of those tensors, with captures of the source if it is of many kinds."""


class Skip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tensors that are left out, and the reason."""

    source: str
    because: str


class RuleBook(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of rules.

    The first rule that fits a tensor applies; a tensor without one is an error.
    """

    format: str
    description: str = ""
    files: tuple[str, ...] = ()
    """For `--from files`: patterns of file names, whose captures are the coordinates of a shard."""
    rules: tuple[Rule, ...] = msgspec.field(name="rule", default=())
    states: tuple[StateRule, ...] = msgspec.field(name="state", default=())
    skips: tuple[Skip, ...] = msgspec.field(name="skip", default=())
    values: dict[str, tuple[str, ...]] = {}
    """By name: where the source's description has a number (dotted paths; the first that exists
    counts), or "= EXPRESSION" of other values."""


def parse_rules(text: str, where: str) -> RuleBook:
    """The rules in a TOML text.

    Raises:
        ConfigError: the text is not TOML, has an unknown key, or has a rule that contradicts
            itself.
    """
    try:
        book = converted(tomllib.loads(text), RuleBook)
    except RecursionError:
        raise ConfigError(f"{where} is not a file of rules: it is nested too deeply") from None
    except (ValueError, msgspec.ValidationError) as error:  # numbers of 5,000 digits, too
        raise ConfigError(f"{where} is not a file of rules: {error}") from error
    for number, rule in enumerate(book.rules, 1):
        _check(rule, f"{where}, rule {number} ({rule.source})")
    for state in book.states:
        if "key" not in Pattern(state.source).captures:
            raise ConfigError(
                f"{where}, state {state.source}: it must have the capture {{key}}, the weight's "
                "name"
            )
        unknown = sorted(Pattern(state.kind).captures - Pattern(state.source).captures)
        if unknown:
            raise ConfigError(
                f"{where}, state {state.source}: the kind {state.kind} uses {unknown[0]}, which it "
                "does not capture"
            )
    return book


def _check(rule: Rule, where: str) -> None:
    if bool(rule.target) == bool(rule.parts):
        raise ConfigError(f"{where}: give either target or parts")
    bound = Pattern(rule.source).captures | set(rule.stacked)
    for target in rule.targets:
        unknown = sorted(Pattern(target).captures - bound)
        if unknown or "*" in target:
            raise ConfigError(
                f"{where}: the target {target} uses {unknown[0] if unknown else '*'}, which the "
                "source "
                f"pattern does not capture ({', '.join(sorted(bound)) or 'it captures nothing'})"
            )
    for condition, known in (
        *((condition, Pattern(rule.source).captures) for condition in rule.conditions),
        (rule.if_target, bound),
    ):
        unknown = sorted(Pattern(condition).captures - known)
        if unknown or "*" in condition:
            raise ConfigError(
                f"{where}: the condition {condition} uses {unknown[0] if unknown else '*'}, which "
                "is not captured"
            )
    if rule.dim < 0 or rule.fused_dim < 0 or (rule.strip is not None and rule.strip.dim < 0):
        raise ConfigError(f"{where}: dimensions count from 0")


def load_rules(path: Path) -> RuleBook:
    """The rules of a file.

    Raises:
        ConfigError: the file cannot be read, or is not a file of rules.
    """
    return parse_rules(rules_text(path), str(path))


def rules_text(path: Path) -> str:
    """The text of a file of rules.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return read_regular(path, _MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--map {path} cannot be read: {error}") from error


def builtin_rules(name: str) -> RuleBook:
    """The rules that holdfast has for a format."""
    text = files("holdfast.checkpoint.convert").joinpath("mappings", f"{name}.toml").read_text()
    return parse_rules(text, f"{name}.toml")


def find_values(
    book: RuleBook, told: Mapping[str, Any], given: Mapping[str, int]
) -> dict[str, int]:
    """The values that rules may use.

    Args:
        told: the source's description of itself, nested.
        given: values from the user, which take precedence.
    """
    found = dict(given)
    for name, paths in book.values.items():
        direct = (_lookup(told, path) for path in paths if not path.startswith("="))
        number = next((n for n in direct if isinstance(n, int) and not isinstance(n, bool)), None)
        if name not in found and number is not None:
            found[name] = number
    # A computed value may need one that is computed before it.
    for name, paths in book.values.items():
        for path in paths:
            if name not in found and path.startswith("="):
                with contextlib.suppress(ConfigError):
                    found[name] = evaluate(path[1:], found, f"value {name}")
    return found


def _lookup(told: Mapping[str, Any], path: str) -> Any:
    value: Any = told
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
