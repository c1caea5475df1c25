"""A memory test: patterns are written to a bounded amount of memory, and read again.

The patterns are those of memory testers such as memtest86: a single one that walks through all
bits of a word, so that bits that stick to each other show, and each word's own number, so that
words at which two addresses meet show; both also inverted. All words are written before the first
is read, so that what a cache holds is not what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor

from holdfast.launch.health.report import Check, failed
from holdfast.trainer.config import machine_memory_bytes

_CHUNK = 1 << 20
"""Words that are made and compared at a time."""
_BITS = 64


def _walking_ones(number: Tensor) -> Tensor:
    return torch.ones_like(number) << number.remainder(_BITS)


def _addresses(number: Tensor) -> Tensor:
    return number


def _inverted(pattern: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda number: ~pattern(number)


PATTERNS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "walking ones": _walking_ones,
    "walking zeros": _inverted(_walking_ones),
    "addresses": _addresses,
    "inverted addresses": _inverted(_addresses),
}
"""By name: the words, int64, for their numbers."""


def write_pattern(words: Tensor, pattern: str) -> None:
    """Fill words with a pattern: int64[words]."""
    for first, part in _parts(words):
        part.copy_(PATTERNS[pattern](_numbers(first, part)))


def first_fault(words: Tensor, pattern: str) -> str:
    """What the first word that lost its pattern has become; empty if all have kept it."""
    for first, part in _parts(words):
        expected = PATTERNS[pattern](_numbers(first, part))
        if not torch.equal(part, expected):
            at = int((part != expected).nonzero()[0])
            flipped = int(part[at]) ^ int(expected[at])
            bits = [bit for bit in range(_BITS) if flipped >> bit & 1]
            return (
                f"{pattern}: byte {8 * (first + at):,} of the tested memory was read with bits "
                f"{', '.join(map(str, bits))} of its word flipped"
            )
    return ""


def check_memory(device: torch.device, tested_bytes: int) -> Check:
    """The memory test of one device, on as much as it gives of what is asked. Local.

    Of the machine's memory an eighth is tested at most.
    """
    if device.type == "cpu":
        tested_bytes = min(tested_bytes, machine_memory_bytes() // 8)
    name, words = f"memory of {device}", tested_bytes // 8
    while True:
        try:
            buffer = torch.empty(words, dtype=torch.int64, device=device)
            break
        except (MemoryError, RuntimeError) as error:  # torch says on a CPU that it has no memory so
            words //= 2
            if 8 * words < _CHUNK:
                return failed(name, 0.0, "MiB", f"no memory can be had: {error}")
    tested_mib = 8 * words / 2**20
    for pattern in PATTERNS:
        write_pattern(buffer, pattern)
        if fault := first_fault(buffer, pattern):
            return failed(name, tested_mib, "MiB", fault)
    return Check(name, tested_mib, "MiB")


def _parts(words: Tensor) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(words), _CHUNK):
        yield first, words[first : first + _CHUNK]


def _numbers(first: int, part: Tensor) -> Tensor:
    return torch.arange(first, first + len(part), dtype=torch.int64, device=part.device)
