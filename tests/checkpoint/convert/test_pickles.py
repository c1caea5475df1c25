"""Pickles are read without being executed; files of torch.save are laid out as torch reads them."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from holdfast.checkpoint.convert.elements.crc32 import combine_crc32
from holdfast.checkpoint.convert.sources import pickles
from holdfast.checkpoint.convert.sources.pickle_lengths import check_lengths
from holdfast.checkpoint.convert.sources.pickles import (
    PickledObject,
    StoredTensor,
    plain,
    read_pickle,
    unplain,
)
from holdfast.checkpoint.convert.sources.torch_files import read_torch_file, tensors_in
from holdfast.checkpoint.convert.writing.torch_writing import (
    TORCH_FILE_DTYPES,
    TensorToCome,
    lay_out,
)
from holdfast.checkpoint.format.dtypes import DTYPE_NAMES, TORCH_DTYPES
from holdfast.parallel.errors import CheckpointError


class Malicious:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


ATTACKS = [
    (os.system, ("touch {marker}",), "system"),
    (eval, ("open('{marker}', 'w')",), "builtins.eval"),
    (exec, ("open('{marker}', 'w')",), "builtins.exec"),
    (getattr, (os, "system"), "builtins.getattr"),
    (__import__, ("os",), "builtins.__import__"),
    (torch.load, ("{marker}",), "torch.serialization.load"),
    (io.open, ("{marker}", "w"), "io.open"),
]


@pytest.mark.parametrize(("function", "arguments", "name"), ATTACKS, ids=[a[2] for a in ATTACKS])
@pytest.mark.parametrize("inside", ["pickle", "torch file", "state of an allowed object"])
def test_malicious_content_is_refused_and_named(
    tmp_path: Path, function: Any, arguments: tuple[Any, ...], name: str, inside: str
) -> None:
    marker = tmp_path / "executed"
    given_arguments = [a.format(marker=marker) if isinstance(a, str) else "os" for a in arguments]
    evil = Malicious(function, *given_arguments)

    def read() -> None:
        if inside == "torch file":
            torch.save({"model": {"w": torch.ones(2)}, "x": evil}, tmp_path / "evil.pt")
            read_torch_file(tmp_path, "evil.pt")
        elif inside == "pickle":
            read_pickle(pickle.dumps({"a": [evil]}), "evil")
        else:
            read_pickle(pickle.dumps(argparse.Namespace(x=evil)), "evil")

    with pytest.raises(CheckpointError, match=rf"evil.* is refused: .*{name}"):
        read()
    assert not marker.exists()


def test_what_frameworks_keep_becomes_plain_values() -> None:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    content = {
        "args": argparse.Namespace(heads=4, name="x", betas=(0.9, 0.95), dtype=torch.bfloat16),
        "index": MetadataIndex("w", torch.Size([0, 3]), 1),
        "groups": OrderedDict(lr=1e-3),
        "names": {"a"},
    }
    found = read_pickle(pickle.dumps(content), "file")
    assert isinstance(found["args"], PickledObject)
    assert found["index"].get("offset") == (0, 3)
    assert plain(found["args"]) == {
        "heads": 4,
        "name": "x",
        "betas": [0.9, 0.95],
        "dtype": "torch.bfloat16",
    }
    assert plain(found["groups"]) == {"lr": 1e-3}
    assert found["names"] == {"a"}
    assert plain(found["names"]) is None


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", b"\x80\x02}q\x00(X\x02"])
def test_a_damaged_pickle_is_told(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(content, "file")


def test_torch_files_are_read_in_place(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    saved = {
        "a": base,
        "b": [base[2:4], base.t()],
        "c": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "d": torch.tensor(3),
    }
    torch.save(saved, tmp_path / "x.pt")
    file = read_torch_file(tmp_path, "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    expected: dict[tuple[str, ...], torch.Tensor] = {
        ("a",): base,
        ("b", "0"): base[2:4],
        ("b", "1"): base.t(),
    }
    expected |= {("c",): saved["c"].detach(), ("d",): saved["d"]}
    for path, tensor in tensors_in(file.content):
        source = file.source("/".join(path), tensor)
        [location] = source.pieces[0].locations
        flat = torch.frombuffer(bytearray(content[location.offset :]), dtype=torch.uint8)
        dtype = TORCH_DTYPES[source.dtype]
        flat = flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        assert torch.equal(flat.as_strided(source.shape, location.strides), expected.pop(path))
    assert not expected


@pytest.mark.parametrize("damage", ["short", "old", "empty"])
def test_what_is_no_torch_file_is_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.ones(100), path, _use_new_zipfile_serialization=damage != "old")
    if damage != "old":
        path.write_bytes(path.read_bytes()[: 300 if damage == "short" else 0])
    words = "before 1.6" if damage == "old" else "truncated or damaged"
    with pytest.raises(CheckpointError, match=words):
        read_torch_file(tmp_path, "x.pt")


@given(
    st.lists(
        st.tuples(st.sampled_from(TORCH_FILE_DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=5,
    )
)
def test_laid_out_files_are_what_torch_reads(forms: list[tuple[str, list[int]]]) -> None:
    torch.manual_seed(1)
    tensors = [(torch.randn(shape) * 3).to(TORCH_DTYPES[dtype]) for dtype, shape in forms]
    come = [TensorToCome(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in enumerate(tensors)]
    layout = lay_out({"tensors": come, "step": 3, "names": ["a"]}, come)
    file = bytearray(layout.bytes)
    raw = [t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in tensors]
    for start, content in zip(layout.starts, raw, strict=True):
        assert start % 64 == 0
        file[start : start + len(content)] = content
    for at, content in layout.parts([zlib.crc32(content) for content in raw]):
        file[at : at + len(content)] = content
    assert zipfile.ZipFile(io.BytesIO(file)).testzip() is None
    found = torch.load(io.BytesIO(file), weights_only=True)
    assert found["step"] == 3
    assert all(torch.equal(a, b) for a, b in zip(found["tensors"], tensors, strict=True))


def test_a_file_beyond_four_gigabytes_is_laid_out_with_wide_records(tmp_path: Path) -> None:
    come = [TensorToCome(0, "U8", (5 << 30,)), TensorToCome(1, "I32", (2,))]
    layout = lay_out(come, come)
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.truncate(layout.bytes)
        for at, content in layout.parts([0, zlib.crc32(b"\1\0\0\0\2\0\0\0")]):
            file.seek(at)
            file.write(content)
        file.seek(layout.starts[1])
        file.write(b"\1\0\0\0\2\0\0\0")
    found = torch.load(path, mmap=True, weights_only=True)
    assert found[0].shape == (5 << 30,)
    assert found[1].tolist() == [1, 2]
    ours = read_torch_file(tmp_path, "large.pt")
    assert dict(ours.offsets) == {"0": layout.starts[0], "1": layout.starts[1]}


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_of_stretches_combine(first: bytes, second: bytes) -> None:
    combined = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)
    long = random.Random(1).randbytes(70_001)
    assert combine_crc32(combined, zlib.crc32(long), len(long)) == zlib.crc32(first + second + long)


LARGE = struct.pack("<I", 0x7FFFFFFF)
LARGER = struct.pack("<Q", 1 << 31)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr" + LARGE + b".",
        b"Np2147483647\n.",
        b"\x80\x02T" + LARGE + b".",
        b"\x80\x02X" + LARGE + b".",
        b"\x80\x03B" + LARGE + b".",
        b"\x80\x02\x8b" + LARGE + b".",
        b"\x80\x04\x8d" + LARGER + b".",
        b"\x80\x04\x8e" + LARGER + b".",
        b"\x80\x05\x96" + LARGER + b".",
        b"\x80\x04\x95" + LARGER + b"N.",
        b"\x80\x04",
        b"\xff.",
        b"",
    ],
    ids=lambda content: repr(content)[2:-1][:16] or "nothing",
)
def test_lengths_of_a_pickle_take_no_memory_that_it_does_not_have(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="f is damaged: its pickle cannot be read"):
            read_pickle(content, "f")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@given(st.recursive(st.integers() | st.text() | st.binary() | st.floats() | st.none(), st.lists))
def test_whatever_python_pickles_has_lengths_that_hold(value: Any) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        check_lengths(pickle.dumps(value, protocol))


def test_few_bytes_do_not_stand_for_any_number_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MOST_VALUES", 1000)
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    found = read_pickle(pickle.dumps(value), "f")
    with pytest.raises(CheckpointError, match="more than"):
        plain(found)
    with pytest.raises(CheckpointError, match="more than"):
        list(tensors_in(found))


@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_bytes_that_are_not_the_values_are_refused(tmp_path: Path, bit: str) -> None:
    conjugate = torch.randn(3, dtype=torch.complex64).conj()
    torch.save({"w": conjugate if bit == "conj" else conjugate.imag}, tmp_path / "lazy.pt")
    with pytest.raises(CheckpointError, match=rf"lazy.pt is refused: .* {bit} bit"):
        read_torch_file(tmp_path, "lazy.pt")


def test_what_has_no_plain_form_is_found_inside() -> None:
    held = {"a": [1, None, b"x"], "b": {"c": StoredTensor("0", "F32", (), (), 0), "d": "text"}}
    assert list(unplain(held, "o")) == ["o/a/2", "o/b/c"]


def test_a_count_that_its_strides_blow_up_is_refused_and_takes_no_memory(tmp_path: Path) -> None:
    torch.save({"step": torch.ones(1).expand(1 << 50)}, tmp_path / "a.pt")
    found = read_torch_file(tmp_path, "a.pt")
    with pytest.raises(CheckpointError, match="where a count should be"):
        found.read(tmp_path, found.content["step"])
