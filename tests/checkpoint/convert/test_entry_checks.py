"""Entries of zip archives that processes read in parts have the checksums that were written."""

from __future__ import annotations

import zlib
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, strategies as st

from holdfast.checkpoint.convert.elements.pieces import ZipRecord
from holdfast.checkpoint.convert.sources.entry_checks import DamagedEntry, EntryChecks
from holdfast.checkpoint.convert.work import worker
from holdfast.checkpoint.convert.work.job import convert
from holdfast.checkpoint.convert.work.request import Conversion
from holdfast.parallel.errors import CheckpointError


@given(
    content=st.binary(min_size=1, max_size=64),
    cuts=st.sets(st.integers(1, 63)),
    order=st.randoms(use_true_random=False),
    flipped=st.booleans(),
)
def test_parts_in_any_order_make_up_the_entry(
    content: bytes, cuts: set[int], order: Random, flipped: bool
) -> None:
    start, end = 100, 100 + len(content)
    entries = {("a.pt", start, len(content)): ZipRecord("a/data/0", zlib.crc32(content))}
    entries["a.pt", end, 4] = ZipRecord("a/data/1", 1)
    entries["b.pt", start, 2] = ZipRecord("b/data/0", 2)
    checks = EntryChecks(Path("folder"), entries)
    if flipped:
        content = bytes([content[0] ^ 1]) + content[1:]
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    parts = [("a.pt", start + a, start + b, zlib.crc32(content[a:b])) for a, b in pairwise(edges)]
    order.shuffle(parts)
    checks.add(parts[:-1])
    # What is read twice, or lies across entries, says nothing.
    checks.add([*parts[:-1], ("a.pt", end - 1, end + 1, 3), ("c.pt", 0, 1, 4)])
    held = sum(b - a for _, a, b, _ in checks.rest())
    if flipped:
        with pytest.raises(
            DamagedEntry, match=r"folder/a\.pt is damaged: its entry a/data/0 \(w\)"
        ):
            checks.add(parts[-1:], "w")
    else:
        checks.add(parts[-1:], "w")
        assert checks.rest() == []
    assert held == sum(b - a for _, a, b, _ in parts[:-1])


def save_source(folder: Path) -> None:
    """A tensor of several units that stays as it is, and one that is taken apart."""
    torch.manual_seed(3)
    folder.mkdir()
    content = {"whole": torch.randn(3000, 1500), "fused": torch.randn(3000, 1500)}
    torch.save(content, folder / "model.pt")
    (folder / "rules.toml").write_text(
        """format = "theirs"
files = ["model.pt"]
[[rule]]
source = "whole"
target = "whole"
[[rule]]
source = "fused"
groups = 3
parts = [{ target = "left", size = 600 }, { target = "right", size = 400 }]
"""
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.mp)])
def test_a_flipped_bit_of_a_large_tensor_is_found_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(worker, "UNITS_IN_A_ROW", 1)
    monkeypatch.setattr(worker, "RECORD_BYTES", 1)
    source = tmp_path / "theirs"
    save_source(source)
    file = source / "model.pt"
    sound = file.read_bytes()
    tensors = torch.load(file, weights_only=True)
    asked = Conversion(source, tmp_path / "out", "hf", rules=source / "rules.toml")
    for entry, name in enumerate(("whole", "fused")):
        bits = bytearray(sound)
        bits[sound.index(tensors[name][1700].numpy().tobytes()) + 5] ^= 4
        file.write_bytes(bits)
        for _ in range(2):
            # What the first attempt has recorded as done does not hide it from the second.
            told = rf"model\.pt is damaged: its entry model/data/{entry}"
            with pytest.raises(CheckpointError, match=told):
                convert(asked, workers=workers)
            assert not (tmp_path / "out").exists()
    file.write_bytes(sound)
    assert convert(asked, workers=workers) is not None
