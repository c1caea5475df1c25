"""Pickles that torch reads, written without importing torch, which saves seconds.

Protocol 2 of Python's pickle, of what checkpoints are made of.
"""

from __future__ import annotations

import struct
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Named:
    """A type or a function: what a module has under a name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function gives."""

    function: Named
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """An object that is made without its constructor, and given its state."""

    type: Named
    state: Any = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference that the reader resolves: a storage of a file of torch.save."""

    id: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict whose keys cannot be those of one here."""

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
        TypeError: anything else.
    """
    parts = [b"\x80\x02"]
    _write(value, parts)
    parts.append(b".")
    return b"".join(parts)


def _write(value: Any, parts: list[bytes]) -> None:
    match value:
        case None:
            parts.append(b"N")
        case bool():
            parts.append(b"\x88" if value else b"\x89")
        case int():
            parts.append(_integer(value))
        case float():
            parts.append(b"G" + struct.pack(">d", value))
        case str():
            text = value.encode("utf-8", "surrogatepass")
            parts.append(b"X" + struct.pack("<I", len(text)) + text)
        case Named(module=module, name=name):
            parts.append(f"c{module}\n{name}\n".encode())
        case tuple():
            parts.append(b"(")
            for item in value:
                _write(item, parts)
            parts.append(b"t")
        case list():
            parts.append(b"](")
            for item in value:
                _write(item, parts)
            parts.append(b"e")
        case Mapping() | Pairs():
            parts.append(b"}(")
            for key, item in value.items if isinstance(value, Pairs) else value.items():
                _write(key, parts)
                _write(item, parts)
            parts.append(b"u")
        case Call(function=function, arguments=arguments):
            _write(function, parts)
            _write(arguments, parts)
            parts.append(b"R")
        case Instance(type=kind, state=state):
            _write(kind, parts)
            parts.append(b")\x81")
            if state is not None:
                _write(state, parts)
                parts.append(b"b")
        case Namespace():
            _write(Instance(Named("argparse", "Namespace"), vars(value)), parts)
        case Persistent(id=id):
            _write(id, parts)
            parts.append(b"Q")
        case _:
            raise TypeError(f"{type(value).__name__} cannot be written to a file of torch")


def _integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content
