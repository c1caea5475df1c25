"""CRC-32C against RFC 3720's vectors and the bitwise definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from holdfast import _native


def checksum(data: bytes, initial: int = 0) -> int:
    array = np.frombuffer(data, np.uint8)
    return _native.crc32c(array.ctypes.data, len(data), initial)


def bitwise(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (
            bytes.fromhex(
                "01c00000000000000000000000000000140000000000040000000014"
                "0000001828000000000000000200000000000000"
            ),
            0xD9963A56,
        ),
    ],
)
def test_published_vectors(data: bytes, crc: int) -> None:
    assert checksum(data) == crc


@pytest.mark.parametrize(
    "length", [1, 7, 8, 9, 255, 767, 768, 769, 1537, 24575, 24576, 24577, 50001]
)
def test_every_path_equals_the_bitwise_definition(length: int) -> None:
    data = np.random.default_rng(length).bytes(length + 3)
    assert checksum(data[:length]) == bitwise(data[:length])
    unaligned = np.frombuffer(data, np.uint8)[3:]
    assert _native.crc32c(unaligned.ctypes.data, length) == bitwise(data[3:])


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_parts_combine_to_the_whole(a: bytes, b: bytes) -> None:
    whole = checksum(a + b)
    assert checksum(b, initial=checksum(a)) == whole
    assert _native.crc32c_combine(checksum(a), checksum(b), len(b)) == whole


def test_combining_over_lengths_beyond_32_bits() -> None:
    # Appending zeros in two steps is appending them in one.
    crc = checksum(b"holdfast")
    zeros_31 = _native.crc32c_combine(crc, 0, 2**31)
    assert _native.crc32c_combine(zeros_31, 0, 2**33) == _native.crc32c_combine(
        crc, 0, 2**33 + 2**31
    )
    assert _native.crc32c_combine(crc, 0, 0) == crc
