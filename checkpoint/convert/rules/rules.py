"""The rules that say what a source's tensors are, as TOML: see docs/convert.md.

Pure; needs no torch.
"""

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

Form = Literal["whole", "replicated", "shard", "sum", "mean"]


class RulePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the tensors that are fused into a source tensor."""

    target: str
    """The same target in several parts is these parts one after the other."""
    size: int | str
    """Its indices along `fused_dim` in each group."""


class Strip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Padding: only the first `size` indices along `dim` are the tensor's."""

    size: int | str
    dim: int = 0
    multiple: int | str = 1
    """When the format is written, zeros are added up to a multiple of this."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the source tensors whose names fit a pattern are.

    It has a field for each word of a rule in the TOML files.
    """

    source: str
    target: str = ""
    """The tensor's name in the model; or `parts`."""
    form: Form = msgspec.field(name="is", default="whole")
    over: str = "tp"
    """The axis of shards that `is` speaks of. Along other axes, copies must be equal."""
    dim: int = 0
    """Of "shard": the dimension that is cut."""
    fragments: str = ""
    """The axis along which the source has flat fragments, of each shard or of the whole."""
    stack: str | tuple[str, ...] = ()
    """The first dimension (or dimensions) enumerates tensors: the capture that its index
    becomes."""
    strip: Strip | None = None
    parts: tuple[RulePart, ...] = ()
    groups: int | str = 1
    """How often the parts follow each other along `fused_dim`; `shards` is the number of shards."""
    fused_dim: int = 0
    transpose: bool = False
    """Swap the last two dimensions."""
    if_source: str = ""
    """The rule holds only where the source has a tensor of this name too; captures are those of
    `source`."""
    if_target: str = ""
    """When the format is written, the rule holds only where the model has a tensor of this name
    too; captures are those of the target."""
    written: bool | tuple[str, ...] = True
    """Whether the format is written so, else the rule is for reading only; or the forms of it that
    are ("" for the usual one)."""

    def is_written(self, form: str) -> bool:
        """Whether the rule holds when a form of the format is written."""
        if isinstance(self.written, bool):
            return self.written and not form
        return form in self.written

    @property
    def stacked(self) -> tuple[str, ...]:
        """`stack` as the captures of the first dimensions."""
        return (self.stack,) if isinstance(self.stack, str) else self.stack

    @property
    def targets(self) -> tuple[str, ...]:
        """The patterns of the tensors that it gives, each once."""
        return tuple(dict.fromkeys(part.target for part in self.parts)) or (self.target,)


class StateRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the names of other tensors than weights are made from those of weights."""

    source: str
    """With a capture {key}: the name of the weight, to which the rules apply."""
    kind: str
    """"master", "exp_avg", "exp_avg_sq", "buffer", …, or with captures of the source."""


class Skip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tensors that are left out."""

    source: str
    because: str


class RuleBook(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of rules. The first that fits a tensor is used; one that no rule fits is an error."""

    format: str
    description: str = ""
    files: tuple[str, ...] = ()
    """For `--from files`: patterns of file names, whose captures are the coordinates of a shard."""
    rules: tuple[Rule, ...] = msgspec.field(name="rule", default=())
    states: tuple[StateRule, ...] = msgspec.field(name="state", default=())
    skips: tuple[Skip, ...] = msgspec.field(name="skip", default=())
    values: dict[str, tuple[str, ...]] = {}
    """By name: where a number is found in what the source tells of itself (dotted paths, the first
    that is there), or "= EXPRESSION" of other values."""


def parse_rules(text: str, where: str) -> RuleBook:
    """The rules in a TOML text.

    Raises:
        ConfigError: not TOML, an unknown key, or a rule that contradicts itself.
    """
    try:
        book = msgspec.convert(tomllib.loads(text), RuleBook)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
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
        (rule.if_source, Pattern(rule.source).captures),
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
        ConfigError: it cannot be read, or is not a file of rules.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--map {path} cannot be read: {error}") from error
    return parse_rules(text, str(path))


def builtin_rules(name: str) -> RuleBook:
    """The rules that come with holdfast for a format."""
    text = files("holdfast.checkpoint.convert").joinpath("mappings", f"{name}.toml").read_text()
    return parse_rules(text, f"{name}.toml")


def find_values(
    book: RuleBook, told: Mapping[str, Any], given: Mapping[str, int]
) -> dict[str, int]:
    """The values that rules may use.

    Args:
        told: what the source tells of itself, nested.
        given: by the user; these win.
    """
    found = dict(given)
    for name, paths in book.values.items():
        direct = (_lookup(told, path) for path in paths if not path.startswith("="))
        number = next((n for n in direct if isinstance(n, int) and not isinstance(n, bool)), None)
        if name not in found and number is not None:
            found[name] = number
    # What is computed may need what is computed before it.
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
