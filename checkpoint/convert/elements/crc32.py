"""CRC-32 of joined byte ranges, without reading them again (zlib's method)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two joined byte ranges, from the CRC-32 of each."""
    if not second_bytes:
        return first
    return _times(_zeros_operator(second_bytes), first) ^ second


@lru_cache(maxsize=1024)
def _zeros_operator(nbytes: int) -> tuple[int, ...]:
    """The effect of `nbytes` zero bytes on a CRC-32: a 32 x 32 matrix over GF(2), by column."""
    power: tuple[int, ...] = (0xEDB88320, *(1 << bit for bit in range(31)))
    found: tuple[int, ...] = tuple(1 << bit for bit in range(32))
    bits = 8 * nbytes
    while bits:
        if bits & 1:
            found = tuple(_times(power, column) for column in found)
        power = tuple(_times(power, column) for column in power)
        bits >>= 1
    return found


def _times(matrix: Sequence[int], vector: int) -> int:
    total, column = 0, 0
    while vector:
        if vector & 1:
            total ^= matrix[column]
        vector >>= 1
        column += 1
    return total
