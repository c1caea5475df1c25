"""A writer of pickles that torch reads; it does not import torch, which saves seconds.

It writes protocol 2 of Python's pickle, for the kinds of values that checkpoints have.
"""

from __future__ import annotations

import struct
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any


@dataclass(frozen=True, slots=True)
class Named:
    """A type or function, by its module and name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """The result of a function call."""

    function: Named
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """An object made without its constructor, from its state."""

    type: Named
    state: Any = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference that the reader resolves: a storage of a file of torch.save."""

    id: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict with keys that a Python dict here cannot have."""

    items: tuple[tuple[Any, Any], ...]


def size(shape: Sequence[int]) -> Call:
    """A torch.Size."""
    return Call(Named("torch", "Size"), (tuple(shape),))


def write_pickle(value: Any) -> bytes:
    """The pickle of a value.

    Args:
        value: numbers, text, lists, tuples, dicts, argparse.Namespace and the classes of this
            module.
    Raises:
        TypeError: the value is anything else.
    """
    parts = [b"\x80\x02"]
    _write(value, parts)
    parts.append(b".")
    return b"".join(parts)


def _write(value: Any, parts: list[bytes]) -> None:
    """Append the opcodes that leave `value` on the stack of an unpickler."""
    plain = _plain(value)
    if plain:
        parts.append(plain)
        return
    match value:
        case tuple():
            _write_items(b"(", value, b"t", parts)
        case list():
            _write_items(b"](", value, b"e", parts)
        case Pairs():
            _write_items(b"}(", chain.from_iterable(value.items), b"u", parts)
        case Mapping():
            _write_items(b"}(", chain.from_iterable(value.items()), b"u", parts)
        case Call(function=function, arguments=arguments):
            _write_items(b"", (function, arguments), b"R", parts)
        case Instance(type=kind, state=None):
            _write_items(b"", (kind,), b")\x81", parts)
        case Instance(type=kind, state=state):
            _write_items(b"", (kind,), b")\x81", parts)
            _write_items(b"", (state,), b"b", parts)
        case Namespace():
            _write(Instance(Named("argparse", "Namespace"), vars(value)), parts)
        case Persistent(id=id):
            _write_items(b"", (id,), b"Q", parts)
        case _:
            raise TypeError(f"{type(value).__name__} cannot be written to a file of torch")


def _write_items(before: bytes, items: Iterable[Any], after: bytes, parts: list[bytes]) -> None:
    parts.append(before)
    for item in items:
        _write(item, parts)
    parts.append(after)


def _plain(value: Any) -> bytes:
    """The opcodes of a value without parts; empty for any other value."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case Named(module=module, name=name):
            return f"c{module}\n{name}\n".encode()
    return b""


def _integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content
