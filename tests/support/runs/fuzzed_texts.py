"""Files and messages as a torn disk or a hostile hand leaves them, each from a number.

`mutated` is pure. `outcome` runs a reader on a text under limits of memory and processor time, and
says how it ended: the only right ends are a value, and one line that says what is wrong.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from holdfast.parallel.errors import HoldfastError

MOST_BYTES = 256 << 20
"""The memory that a reader may ask for, beyond what the process has."""
MOST_CPU_S = 5.0
_MOST_CHARACTERS = 4000
_DEEP, _NAN = "deep-goes-here", "nan-goes-here"

ODD: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 63, 255, 4096, 2**31, 2**40, 2**53, 2**62, 2**63, 2**64, 10**40, -(2**63),
    -(10**40), 0.0, -0.5, 0.5, 1e300, -1e300, 1e308, True, False, None, "", ".", "..", "../../x",
    "/dev/zero", "a\x00b", "\x1b[2J\x1b]0;x\x07", "\ud800", "日本", "a" * 5000, "1", "-1", "1e5",
    "0-1000000000", "1" * 4000, "0x1p99999", "nan", "F7", [], [0], [-1], [[]], [1] * 5000, {},
    {"a": 1}, [{}], [None], _DEEP, _NAN, math.inf,
)  # fmt: skip

_ODD_BYTES = (
    b"", b"\0", b"\0" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 100_000, b'{"a":' * 5000,
    b"9" * 6000, b'"', b"}", b"\n", b"-", b"\xff" * 8,
)  # fmt: skip


def mutated(number: int, content: bytes) -> bytes:
    """The text of this number: `content` with some parts of it replaced. Pure."""
    chance = random.Random(number)
    if chance.random() < 0.35:
        for _ in range(chance.choice((1, 1, 2, 5))):
            content = _torn(content, chance)
        return content
    try:
        value = json.loads(content)
    except ValueError:
        return _torn(content, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        value = _changed(value, chance)
    depth = chance.choice((100, 1100, 100_000))
    return (
        json.dumps(value, ensure_ascii=True, separators=(",", ":"))
        .replace(json.dumps(_DEEP), "[" * depth + "]" * depth)
        .replace(json.dumps(_NAN), chance.choice(("NaN", "-Infinity", "1e999", "9" * 6000)))
        .encode()
    )


def _torn(content: bytes, chance: random.Random) -> bytes:
    """The bytes with a part cut off, repeated, exchanged or put in."""
    at = chance.randrange(len(content) + 1)
    end = min(len(content), at + chance.choice((1, 1, 2, 8, 100)))
    other = chance.choice((*_ODD_BYTES, bytes([chance.randrange(256)])))
    match chance.randrange(5):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + other + content[end:]
        case 2:
            return content[:at] + other + content[at:]
        case 3:
            return content + content[at:end]
        case _:
            return chance.choice((content.decode(errors="replace").encode("utf-16"), other))


def _changed(value: Any, chance: random.Random) -> Any:
    """The value with one of its parts replaced, removed, added or renamed."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.1:
        return chance.choice(ODD)
    if isinstance(value, list):
        found = list(value)
        at = chance.randrange(len(found))
        match chance.randrange(8):
            case 0:
                del found[at]
            case 1:
                found.insert(at, chance.choice(ODD))
            case 2:
                found.append(found[at])
            case _:
                found[at] = _changed(found[at], chance)
        return found
    key = chance.choice(list(value))
    other = {**value}
    match chance.randrange(8):
        case 0:
            del other[key]
        case 1:
            other[str(chance.choice(ODD))[:5000]] = other.pop(key)
        case 2:
            other[chance.choice(("x", "", "__metadata__", "\x1b[31m"))] = chance.choice(ODD)
        case _:
            other[key] = _changed(other[key], chance)
    return other


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit what this process may ask for during the block: memory, and processor time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, _endless)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def _endless(*_: object) -> None:
    raise TimeoutError(f"no end within {MOST_CPU_S:g} s of processor time")


def outcome(read: Callable[[bytes], object], content: bytes) -> str:
    """ "accepted", "refused", or what went wrong."""
    try:
        read(content)
    except HoldfastError as error:
        text = str(error)
        clear = text and len(text) < _MOST_CHARACTERS and text.isprintable()
        return "refused" if clear else f"unclear: {text[:500]!r}"
    except BaseException:
        return traceback.format_exc()[-3000:]
    return "accepted"
