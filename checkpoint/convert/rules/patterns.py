"""The small languages of mapping rules: name patterns with captures, and integer expressions.

Pure.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from holdfast.parallel.errors import ConfigError

_FIELD = re.compile(r"\{([a-z_][a-z0-9_]*)(:[dw])?\}|\*")
_CHARACTERS = {None: ".+", ":d": "[0-9]+", ":w": "[A-Za-z0-9_]+"}


@dataclass(frozen=True)
class Pattern:
    """A name with captures.

    `{word}` is one or more characters, `{word:d}` digits, `{word:w}` letters, digits and
    underscores, `*` anything. A capture that occurs twice must match the same text both times.
    """

    text: str

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts, end = [], 0
        seen: set[str] = set()
        for field in _FIELD.finditer(self.text):
            parts.append(re.escape(self.text[end : field.start()]))
            end = field.end()
            name, form = field.groups()
            if name is None:
                parts.append(".*")
            elif name in seen:
                parts.append(f"(?P={name})")
            else:
                parts.append(f"(?P<{name}>{_CHARACTERS[form]})")
                seen.add(name)
        parts.append(re.escape(self.text[end:]))
        return re.compile("".join(parts))

    @cached_property
    def captures(self) -> frozenset[str]:
        """The names of the captures."""
        return frozenset(f.group(1) for f in _FIELD.finditer(self.text) if f.group(1) is not None)

    def match(self, name: str) -> dict[str, str] | None:
        """The captures of a name; None if it does not fit."""
        found = self._regex.fullmatch(name)
        return None if found is None else found.groupdict()

    def fill(self, captured: Mapping[str, str]) -> str:
        """The name that results from the captures."""
        return _FIELD.sub(lambda field: captured[field.group(1)], self.text)


def evaluate(expression: str | int, values: Mapping[str, int], where: str) -> int:
    """An integer from digits, names of values, + - * / and parentheses. Division must be exact.

    Args:
        where: the caller, for messages.
        values: the values by name.
    Raises:
        ConfigError: the expression is invalid, has an unknown name, or a division has a remainder.
    """
    if isinstance(expression, int):
        return expression
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"{where}: {expression!r} is not an expression: {error.msg}") from error
    return _value(tree, expression, values, where)


def _value(node: ast.expr, text: str, values: Mapping[str, int], where: str) -> int:
    def value(part: ast.expr) -> int:
        return _value(part, text, values, where)

    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            if name not in values:
                known = ", ".join(sorted(values)) or "none"
                raise ConfigError(
                    f"{where}: {text!r} needs the value {name}, which the source does not tell "
                    f"(known: {known}); give it with --value {name}=NUMBER"
                )
            return values[name]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return value(left) + value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return value(left) - value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return value(left) * value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            a, b = value(left), value(right)
            if b == 0 or a % b:
                raise ConfigError(f"{where}: in {text!r}, {a} cannot be divided by {b}")
            return a // b
    raise ConfigError(
        f"{where}: {text!r} is not an expression of numbers, names, + - * / and parentheses"
    )
