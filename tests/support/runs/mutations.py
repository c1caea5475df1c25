"""Documents as a damaged disk or a hostile hand leaves them, each from a number. Pure."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

COUNT = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 300
"""The documents that a test tries of each kind."""
MOST_BYTES = 64 << 20
"""The memory that reading a small document may take at most."""

VALUES: tuple[Any, ...] = (
    0, 1, -1, 7, 255, 4096, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63), 10**300,
    0.0, -0.5, 1e300, float("nan"), float("inf"), True, False, None,
    "", ".", "..", "x", "F32", "F7", "../../x", "/etc/passwd", "/dev/zero", "a\0b", "\x1b]0;x\x07",
    "0-1000000000", "1" * 4000, "0x1p99999", "nan", "[bold]x", "\ud800", "x" * 5000, "é\u202e",
    [], [0], [-1], [1, 2, 3], [[1]], ["x"],
    [2**62, 2**62], [1] * 1000, [None], {}, {"a": 1}, {"": {}}, [{}],
)  # fmt: skip
_DEEP = 20_000


def mutated(document: Any, number: int) -> bytes:
    """The JSON text of a document with one or a few things wrong."""
    chance = random.Random(number)
    changed = copy.deepcopy(document)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        changed = _changed(changed, chance)
    content = json.dumps(changed).encode()
    return torn(content, chance) if chance.random() < 0.3 else content


def mutated_text(text: bytes, number: int) -> bytes:
    """A text with one or a few things wrong: JSON, lines of it, or of any other form."""
    chance = random.Random(number)
    lines = text.splitlines(keepends=True)
    if chance.random() < 0.8:
        at = chance.randrange(len(lines))
        try:
            changed = mutated(json.loads(lines[at]), number)
        except ValueError:
            return torn(text, chance)
        lines[at] = changed + b"\n" if lines[at].endswith(b"\n") else changed
        return b"".join(lines)
    return torn(text, chance)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield value, index
            yield from _places(item)


def _changed(document: Any, chance: random.Random) -> Any:
    places = list(_places(document))
    if not places or chance.random() < 0.03:
        return copy.deepcopy(chance.choice(VALUES))
    container, key = chance.choice(places)
    value = container[key]
    match chance.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.insert(key, copy.deepcopy(value))
        case 1:
            container[str(chance.choice(VALUES))] = container.pop(key)
        case 2 if isinstance(value, int):
            container[key] = value + chance.choice((-4096, -1, 1, 4096, 2**40))
        case 3:
            container[key] = [value]
        case 4:
            other, of = chance.choice(places)
            if isinstance(other, dict | list) and (
                of in other if isinstance(other, dict) else True
            ):
                container[key] = copy.deepcopy(_at(other, of))
        case _:
            container[key] = copy.deepcopy(chance.choice(VALUES))
    return document


def _at(container: Any, key: Any) -> Any:
    return container[key] if isinstance(container, dict) or key < len(container) else None


def torn(content: bytes, chance: random.Random) -> bytes:
    """The bytes with a part cut off, exchanged or put in."""
    at = chance.randrange(len(content) + 1)
    match chance.randrange(9):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
        case 2:
            return content[:at] + chance.randbytes(8) + content[at:]
        case 3:
            return b"\xef\xbb\xbf" + content
        case 4:
            return content.decode(errors="replace").encode("utf-16")
        case 5:
            return content + b"\0" * 1000
        case 6:
            return content.replace(b":", b":" + b"[" * _DEEP + b"]" * _DEEP + b",", 1)
        case 7:
            return content[:-1] + b',"z":' + b'{"a":' * _DEEP + b"1" + b"}" * _DEEP + b"}"
        case _:
            return content.replace(b"1", b"9" * 6000, 1)
