"""Bad sources: each is told in one line that names what is wrong.

The source stays as it was, and no output looks done.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from holdfast.checkpoint.convert.work.job import convert
from holdfast.checkpoint.convert.work.request import Conversion
from holdfast.parallel.errors import CheckpointError, HoldfastError

RULES = """
format = "theirs"
files = ["model_{tp:d}.pt"]
[[rule]]
source = "w"
target = "w"
is = "shard"
[[rule]]
source = "norm"
target = "norm"
is = "replicated"
"""
SHARDS = 3


def shard(rank: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)
    return {"w": torch.randn(4, 300), "norm": torch.arange(300.0)}


def rewrite(rank: int, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[..., None]:
    def apply(folder: Path) -> None:
        content = shard(rank)
        change(content)
        torch.save(content, folder / f"model_{rank}.pt")

    return apply


def missing(folder: Path) -> None:
    (folder / "model_1.pt").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model_2.pt"
    file.write_bytes(file.read_bytes()[:-4000])


def record_of(file: Path, ending: str) -> tuple[int, int]:
    """(first byte, length) of an entry of a zip archive."""
    with zipfile.ZipFile(file) as archive:
        [entry] = [e for e in archive.infolist() if e.filename.endswith(ending)]
    content = file.read_bytes()
    name, extra = (
        int.from_bytes(content[entry.header_offset + at :][:2], "little") for at in (26, 28)
    )
    return entry.header_offset + 30 + name + extra, entry.file_size


def flip(folder: Path, ending: str) -> None:
    """One bit in the middle of an entry: torch.load would not notice where it is a tensor's."""
    file = folder / "model_1.pt"
    start, length = record_of(file, ending)
    content = bytearray(file.read_bytes())
    content[start + length // 2] ^= 4
    file.write_bytes(content)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing shard": (missing, r"w.*shard 1 along tp is missing"),
    "a truncated file": (truncated, r"model_2\.pt is truncated or damaged"),
    "copies that disagree": (
        rewrite(1, lambda content: content["norm"][7].add_(1)),
        r"norm\S*: \S*model_0\.pt and \S*model_1\.pt hold copies of it that differ in 1 of 300",
    ),
    "another shape": (
        rewrite(2, lambda content: content.update(w=torch.zeros(4, 299))),
        r"w \(tp 0\) has shape \[4, 300\] and w \(tp 2\) \[4, 299\]",
    ),
    "another type": (
        rewrite(2, lambda content: content.update(w=content["w"].half())),
        r"its shards have dtypes F16 and F32",
    ),
    "an unknown name": (
        rewrite(0, lambda content: content.update(extra=torch.zeros(2))),
        r"no rule of theirs fits extra \(tp 0\) F32 \[2\]",
    ),
    "a flipped bit of a tensor": (
        lambda folder: flip(folder, "data/0"),
        r"model_1\.pt is damaged: its entry model_1/data/0 \(w\) has checksum",
    ),
    "a flipped bit of the pickle": (
        lambda folder: flip(folder, "data.pkl"),
        r"model_1\.pt is truncated or damaged \(Bad CRC-32 for file 'model_1/data\.pkl'\)",
    ),
}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_source_is_named_and_left_alone(tmp_path: Path, kind: str) -> None:
    damage, message = BAD[kind]
    source, out = tmp_path / "theirs", tmp_path / "out"
    source.mkdir()
    for rank in range(SHARDS):
        torch.save(shard(rank), source / f"model_{rank}.pt")
    sound = Path(shutil.copytree(source, tmp_path / "sound"))
    damage(source)
    (tmp_path / "rules.toml").write_text(RULES)
    asked = Conversion(source, out, "hf", rules=tmp_path / "rules.toml")
    before = contents(source)
    with pytest.raises(HoldfastError, match=message) as caught:
        convert(asked)
    assert "\n" not in str(caught.value)
    assert contents(source) == before
    assert not out.exists()
    # Mended, the same command does it, whatever is left of the attempt.
    shutil.rmtree(source)
    sound.rename(source)
    assert convert(asked) is not None
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["w"], torch.cat([shard(rank)["w"] for rank in range(SHARDS)]))
    assert not out.with_name("out.partial").exists()


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(shard(0), source / "model_0.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    (tmp_path / "rules.toml").write_text(RULES)
    asked = Conversion(source, tmp_path / "out", "hf", rules=tmp_path / "rules.toml")
    assert convert(asked) is not None
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["w"], shard(0)["w"])


def test_a_source_that_shrinks_while_it_is_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    torch.save({"w": torch.randn(400, 300)}, source / "model_0.pt")
    (tmp_path / "rules.toml").write_text(RULES)
    asked = Conversion(source, tmp_path / "out", "hf", rules=tmp_path / "rules.toml")

    def cut(*_: object) -> int:
        file = source / "model_0.pt"
        file.write_bytes(file.read_bytes()[:100_000])
        return 1 << 40

    # Asked for between opening the source and reading it.
    monkeypatch.setattr("holdfast.checkpoint.convert.work.job.free_bytes", cut)
    with pytest.raises(CheckpointError, match=r"model_0\.pt cannot be read: the file ends at byte"):
        convert(asked)
    assert not (tmp_path / "out").exists()
