"""The bytes of a checkpoint: headers that safetensors reads, and a manifest that guards itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st
from safetensors import safe_open

from holdfast.checkpoint.format.dtypes import DTYPE_NAMES, TORCH_DTYPES
from holdfast.checkpoint.format.files import (
    ELEMENT_BYTES,
    FileEntry,
    FileTensor,
    Manifest,
    PieceEntry,
    TensorEntry,
    crc32c_of,
    decode_header,
    decode_manifest,
    encode_header,
    encode_manifest,
    header_bytes,
    header_capacity,
    key_of,
)
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.layout.boxes import Box


def _manifest() -> Manifest:
    piece = PieceEntry(4096, 24, (0, 0), (2, 3), 0xFFFFFFFF)
    return Manifest(
        id="0" * 32,
        step=7,
        created=1.5,
        tensors={"lm_head.weight": TensorEntry("weight", "F32", (2, 3))},
        files={
            "model.safetensors": FileEntry(
                bytes=4120, header_bytes=4096, crc32c=3, pieces={"lm_head.weight": (piece,)}
            )
        },
        scalars={"step": 7, 'odd","crc32c":"': "text"},
    )


def test_a_manifest_comes_back() -> None:
    manifest = _manifest()
    content = encode_manifest(manifest)
    assert decode_manifest(content, "here") == manifest
    plain = json.loads(content)
    assert plain["format"] == "holdfast"
    assert plain["files"]["model.safetensors"]["chunks"]["lm_head.weight"][0][4] == 0xFFFFFFFF


def test_any_changed_or_lost_byte_of_a_manifest_is_found() -> None:
    content = encode_manifest(_manifest())
    for place in range(len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 0x20
        with pytest.raises(CheckpointError, match=r"here"):
            decode_manifest(bytes(damaged), "here")
        with pytest.raises(CheckpointError, match=r"here"):
            decode_manifest(content[:place], "here")


def test_a_newer_format_is_refused() -> None:
    newer = Manifest(id="", step=1, created=0.0, tensors={}, files={}, format_version=2)
    with pytest.raises(CheckpointError, match="format version 2; this version of holdfast reads 1"):
        decode_manifest(encode_manifest(newer), "here")


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_checksums_do_not_depend_on_how_bytes_are_held(content: bytes, initial: int) -> None:
    assert crc32c_of(content, initial) == crc32c_of(bytearray(content), initial)
    assert crc32c_of(b"123456789") == 0xE3069283


@pytest.mark.parametrize("dtype", sorted(ELEMENT_BYTES))
def test_a_header_opens_in_safetensors(dtype: str, tmp_path: Path) -> None:
    """safetensors is the judge of our headers, and of our names of element types."""
    torch_dtype = TORCH_DTYPES[dtype]
    assert torch_dtype.itemsize == ELEMENT_BYTES[dtype]
    assert DTYPE_NAMES[torch_dtype] == dtype
    values = torch.arange(24, dtype=torch.uint8).repeat(torch_dtype.itemsize)
    if torch_dtype == torch.bool:
        values = values % 2
    values = values.view(torch_dtype).view(-1)[:24].view(4, 6)
    shape, box = (4, 6), Box((1, 0), (3, 6))
    size = box.elements * torch_dtype.itemsize
    entries = {"a.weight": TensorEntry("weight", dtype, shape)}
    whole = FileTensor("b", "a.weight", Box.whole(shape), size, size + values.nbytes)
    part = FileTensor(key_of("a.weight", box, shape), "a.weight", box, 0, size)
    pieces = {"a.weight": [PieceEntry(0, size, box.start, box.stop, 1)]}
    capacity = header_capacity([part, whole], entries, pieces)
    assert capacity % 4096 == 0
    header = encode_header([part, whole], entries, pieces, id="f" * 32, step=3, capacity=capacity)
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    rows = values[1:3].contiguous().view(torch.uint8).numpy().tobytes()
    path = tmp_path / "file.safetensors"
    path.write_bytes(header + rows + raw)
    with safe_open(str(path), framework="pt") as file:
        assert set(file.keys()) == {"a.weight[1:3,0:6]", "b"}
        assert file.metadata()["format"] == "pt"
    loaded = safetensors.torch.load_file(str(path))
    assert torch.equal(loaded["b"].view(torch.uint8), values.contiguous().view(torch.uint8))
    assert loaded["a.weight[1:3,0:6]"].shape == (2, 6)
    found = decode_header(header, "here")
    assert (found.id, found.step, found.pieces["a.weight"]) == (
        "f" * 32,
        3,
        tuple(pieces["a.weight"]),
    )
    assert header_bytes(header[:8], len(header), "here") == capacity


@pytest.mark.parametrize("first", [b"", b"\x00" * 8, b"\xff" * 8])
def test_what_is_no_header_is_refused(first: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        header_bytes(first, 100, "here")
    with pytest.raises(CheckpointError, match="no header of a holdfast checkpoint"):
        decode_header(b"\x02\0\0\0\0\0\0\0{}", "here")
