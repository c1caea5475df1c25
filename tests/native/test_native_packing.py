"""Packed sums against the format in numpy, byte for byte in both directions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from holdfast import _native

RUN = 512
OUT_OF_RANGE = 2
GUARD = 64
"""Bytes (or elements) on both sides of what a kernel may write."""


def width_of(run: np.ndarray) -> int:
    """The fewest bytes whose two's complement holds the least and the greatest value of `run`."""
    least, greatest = int(run.min()), int(run.max())
    if least == greatest == 0:
        return 0
    return next(
        w for w in range(1, 9) if -(2 ** (8 * w - 1)) <= least <= greatest < 2 ** (8 * w - 1)
    )


def planes_of(width: int) -> list[tuple[int, int]]:
    """(first byte, bytes) of each plane of a run, in order."""
    planes, first = [], 0
    for size in (8, 4, 2, 1):
        if width & size:
            planes.append((first, size))
            first += size
    return planes


def packed_by_numpy(sums: np.ndarray, widths: list[int] | None = None) -> bytes:
    """The packed form of `sums`; with the widths given, or the least."""
    runs = [sums[start : start + RUN] for start in range(0, len(sums), RUN)]
    widths = widths or [width_of(run) for run in runs]
    header = bytes(widths) + bytes(-len(runs) % 8)
    payload = b"".join(
        np.ascontiguousarray(
            run.astype("<i8").view(np.uint8).reshape(-1, 8)[:, first : first + size]
        ).tobytes()
        for run, width in zip(runs, widths, strict=True)
        for first, size in planes_of(width)
    )
    return header + payload


def pack(sums: np.ndarray) -> bytes:
    """What the kernel writes, checked to stay within its bound."""
    bound = _native.packed_bound(len(sums))
    room = np.full(GUARD + bound + GUARD, 0xA5, np.uint8)
    written = _native.pack_i64(sums.ctypes.data, len(sums), room[GUARD:].ctypes.data)
    assert written <= bound
    assert (room[:GUARD] == 0xA5).all()
    assert (room[GUARD + written :] == 0xA5).all()
    return room[GUARD : GUARD + written].tobytes()


def unpack_add(packed: bytes, base: np.ndarray | None, count: int) -> tuple[np.ndarray, int]:
    """base + packed into memory of its own, checked to stay within it; and the flags."""
    source = np.frombuffer(packed, np.uint8)
    room = np.full(GUARD + count + GUARD, -7, np.int64)
    address = 0 if base is None else base.ctypes.data
    target = room[GUARD:].ctypes.data
    flags = _native.unpack_add_i64(source.ctypes.data, len(packed), address, target, count)
    assert (room[:GUARD] == -7).all()
    assert (room[GUARD + count :] == -7).all()
    return room[GUARD : GUARD + count].copy(), flags


def edges(width: int) -> list[int]:
    """The values around the ends of what `width` bytes hold, as far as int64 has them."""
    end = 2 ** (8 * width - 1)
    return [v for v in (-end - 1, -end, -end + 1, end - 1, end) if -(2**63) <= v < 2**63]


@st.composite
def sums_of_runs(draw: st.DrawFn) -> np.ndarray:
    """One to three runs, each of a size of its own, the last of any length, some with one value
    apart.
    """
    runs = draw(st.integers(1, 3))
    last = draw(st.one_of(st.integers(1, 200), st.integers(RUN - 3, RUN), st.integers(1, RUN)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = []
    for length in [RUN] * (runs - 1) + [last]:
        width = draw(st.integers(0, 8))
        end = 2 ** (8 * width - 1) if width else 0
        run = random.integers(-end, max(end, 1), length, dtype=np.int64)
        if draw(st.booleans()):
            place = draw(st.integers(0, length - 1))
            run[place] = draw(st.sampled_from([0, -1, *edges(draw(st.integers(1, 8)))]))
        parts.append(run)
    return np.concatenate(parts)


@given(sums_of_runs(), st.data())
def test_sums_come_back_and_numpy_writes_the_same_bytes(
    sums: np.ndarray, data: st.DataObject
) -> None:
    count = len(sums)
    packed = pack(sums)
    assert packed == packed_by_numpy(sums)
    assert unpack_add(packed, None, count)[0].tolist() == sums.tolist()
    if count >= 1024:
        assert len(packed) <= 1.01 * 8 * count

    base = np.random.default_rng(data.draw(st.integers(0, 9))).integers(-(2**63), 2**63, count)
    base >>= data.draw(st.integers(0, 40))
    total = base.astype(object) + sums.astype(object)
    wrapped = (total + 2**63) % 2**64 - 2**63
    wanted = wrapped.tolist(), OUT_OF_RANGE if (wrapped != total).any() else 0
    added, flags = unpack_add(packed, base, count)
    assert (added.tolist(), flags) == wanted
    source = np.frombuffer(packed, np.uint8)
    flags = _native.unpack_add_i64(
        source.ctypes.data, len(packed), base.ctypes.data, base.ctypes.data, count
    )
    assert (base.tolist(), flags) == wanted


@pytest.mark.parametrize("width", range(1, 9))
def test_a_run_has_the_least_width_that_holds_all_its_values(width: int) -> None:
    for value in edges(width):
        for length, place in ((1, 0), (RUN, 0), (RUN, RUN - 1), (RUN + 1, RUN), (999, 500)):
            sums = np.zeros(length, np.int64)
            sums[place] = value
            packed = pack(sums)
            assert packed == packed_by_numpy(sums), (value, length, place)
            assert unpack_add(packed, None, length)[0].tolist() == sums.tolist()


def test_sums_that_need_few_bytes_take_few() -> None:
    assert pack(np.zeros(3 * RUN, np.int64)) == bytes(8)
    assert pack(np.full(3, -1, np.int64)) == bytes([1, *[0] * 7, 255, 255, 255])
    assert pack(np.zeros(0, np.int64)) == b""
    sums = np.array([0x1234567890, -2], np.int64)
    assert pack(sums).hex() == "0500000000000000" + "90785634" + "feffffff" + "12" + "ff"


@given(sums_of_runs(), st.data())
def test_a_reader_takes_wider_runs_than_needed(sums: np.ndarray, data: st.DataObject) -> None:
    runs = [sums[start : start + RUN] for start in range(0, len(sums), RUN)]
    widths = [data.draw(st.integers(width_of(run), 8)) for run in runs]
    packed = packed_by_numpy(sums, widths)
    assert unpack_add(packed, None, len(sums))[0].tolist() == sums.tolist()


@pytest.mark.parametrize("length", [*range(1, 70), 127, 130, 1001])
def test_every_length_and_alignment_gives_the_same_bytes(length: int) -> None:
    for width in range(1, 9):
        end = 2 ** (8 * width - 1)
        drawn = np.random.default_rng(width).integers(-end, end, length + 3, dtype=np.int64)
        for shift in range(4):
            sums = drawn[shift : shift + length]
            packed = pack(sums)
            assert packed == packed_by_numpy(sums)
            source = np.frombuffer(bytes(shift) + packed, np.uint8)[shift:].copy()
            target = np.zeros(length + 3, np.int64)[shift : shift + length]
            _native.unpack_add_i64(source.ctypes.data, len(packed), 0, target.ctypes.data, length)
            assert target.tolist() == sums.tolist()


def test_what_is_malformed_is_refused_and_nothing_is_written() -> None:
    sums = np.arange(2 * RUN + 5, dtype=np.int64) << 20
    packed = pack(sums)

    def refused(damaged: bytes, sentence: str, count: int = len(sums)) -> None:
        source, target = np.frombuffer(damaged + bytes(1), np.uint8), np.full(len(sums), 3)
        with pytest.raises(ValueError, match=sentence):
            _native.unpack_add_i64(source.ctypes.data, len(damaged), 0, target.ctypes.data, count)
        assert (target == 3).all()

    refused(packed[:2] + bytes([9]) + packed[3:], "run 2 has a width of 9 bytes; allowed: 0 to 8")
    refused(bytes([255]) + packed[1:], "run 0 has a width of 255 bytes")
    refused(packed[:-1], f"packed in {len(packed)} bytes; there are {len(packed) - 1}")
    refused(bytes([8]) + packed[1:], f"packed in .* bytes; there are {len(packed)}")
    refused(packed[:7], f"the header of {len(sums)} packed elements has 8 bytes; there are 7")
    refused(b"", "there are 0")
    refused(packed, "count is -1; allowed: 0 to", -1)
    with pytest.raises(ValueError, match="count is -5; allowed: 0 to"):
        _native.packed_bound(-5)
    with pytest.raises(ValueError, match=r"allowed: 0 to 2\*\*59"):
        _native.packed_bound(2**60)


@given(st.binary(max_size=300), st.integers(0, 12000))
def test_any_bytes_are_read_or_refused_within_their_bounds(packed: bytes, count: int) -> None:
    try:
        unpack_add(packed, None, count)
    except ValueError as error:
        assert "bytes" in str(error)  # noqa: PT017
