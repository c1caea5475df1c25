"""Whatever happens to a checkpoint's files is found by `verify` and by loading, and is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from holdfast.checkpoint import load, save
from holdfast.checkpoint.format.files import MANIFEST
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.stores.protocol import newest
from holdfast.checkpoint.stores.registry import find_checkpoint, read_manifest
from holdfast.checkpoint.tools.verify import Problem, rebuild_manifest, verify_checkpoint
from holdfast.parallel.errors import CheckpointError

SHAPES = {"model": {"a": (50, 40), "b": (7,)}, "moments": {"c": (300, 9)}}


def _state(fill: float | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(fill or 0))
    found = {}
    for group in SHAPES.values():
        for name, shape in group.items():
            found[name] = (
                torch.zeros(shape) if fill is None else torch.randn(shape, generator=generator)
            )
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one program, with weights, other tensors and an index."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        module = torch.nn.Linear(30, 20)
        save(folder, {"model": module, **_state(step)}, step=step)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "saved")
    return tmp_path / "saved"


def _load(checkpoint: Path) -> None:
    load(checkpoint, {"model": torch.nn.Linear(30, 20), **_state(None)})


def _problems(checkpoint: Path) -> list[Problem] | str:
    try:
        return verify_checkpoint(checkpoint)
    except CheckpointError as error:
        return str(error)


def test_an_undamaged_checkpoint_has_no_problems(folder: Path) -> None:
    for checkpoint in folder.iterdir():
        if checkpoint.is_dir():
            assert verify_checkpoint(checkpoint) == []
            _load(checkpoint)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_flipped_bit_is_found_and_named(saved: Path, data: st.DataObject) -> None:
    checkpoint = saved / "step-00000002"
    files = sorted(path for path in checkpoint.iterdir())
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        found = _problems(checkpoint)
        assert found
        assert path.name in str(found[0] if isinstance(found, list) else found)
        with pytest.raises(CheckpointError) as caught:
            _load(checkpoint)
        assert path.name in str(caught.value)
        entry = read_manifest(checkpoint).files[path.name] if path.name != MANIFEST else None
        if entry is not None and entry.header_bytes and place >= entry.header_bytes:
            assert isinstance(found, list)
            name, box = found[0].tensor, found[0].box
            assert any(
                piece.offset <= place < piece.offset + piece.length and str(piece.box) == box
                for piece in entry.pieces[name]
            )
            assert f"{name}{box}" in str(caught.value)
    finally:
        path.write_bytes(content)


def _delete(path: Path, other: Path) -> None:
    path.unlink()


def _truncate(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _halve(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _extend(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _zero(path: Path, other: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _foreign(path: Path, other: Path) -> None:
    """The same file of another save: every size and name is right."""
    shutil.copyfile(other / path.name, path)


@pytest.mark.parametrize("harm", [_delete, _truncate, _halve, _extend, _zero, _foreign])
@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00001.safetensors",
        "optimizer-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "manifest.json",
    ],
)
def test_harm_to_whole_files_is_found(
    folder: Path, harm: Callable[[Path, Path], None], name: str
) -> None:
    checkpoint = folder / "step-00000002"
    path = checkpoint / name
    before = path.read_bytes()
    harm(path, folder / "step-00000001")
    if path.exists() and path.read_bytes() == before:
        pytest.skip("the other save's file is the same byte for byte")
    if name == MANIFEST and harm is _foreign:
        # A whole manifest of another save: every header belongs to another one.
        assert {problem.file for problem in verify_checkpoint(checkpoint)} >= {
            "model-00001-of-00001.safetensors"
        }
    else:
        assert name in str(_problems(checkpoint)) or "manifest" in str(_problems(checkpoint))
    with pytest.raises(CheckpointError):
        _load(checkpoint)


def test_swapped_files_are_found(folder: Path) -> None:
    checkpoint = folder / "step-00000002"
    first = checkpoint / "model-00001-of-00001.safetensors"
    second = checkpoint / "optimizer-00001-of-00001.safetensors"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert {problem.file for problem in verify_checkpoint(checkpoint)} == {first.name, second.name}
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001|optimizer-00001-of-00001"):
        _load(checkpoint)


def test_a_foreign_file_is_named_with_its_step(folder: Path) -> None:
    checkpoint = folder / "step-00000002"
    _foreign(checkpoint / "optimizer-00001-of-00001.safetensors", folder / "step-00000001")
    assert "it belongs to step 1" in str(verify_checkpoint(checkpoint)[0])


def test_a_file_that_is_not_of_the_checkpoint_is_named(folder: Path) -> None:
    checkpoint = folder / "step-00000002"
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    [problem] = verify_checkpoint(checkpoint)
    assert str(problem) == "pytorch_model.bin: is not part of this checkpoint"


def test_a_folder_without_manifest_is_no_checkpoint(folder: Path) -> None:
    (folder / "step-00000002" / MANIFEST).unlink()
    assert newest(LocalStore(folder)) == "step-00000001"
    with pytest.raises(CheckpointError, match="not a committed checkpoint"):
        read_manifest(folder / "step-00000002")


def test_latest_is_a_hint_and_no_more(folder: Path) -> None:
    assert find_checkpoint(folder / "latest").name == "step-00000002"
    (folder / "latest").write_text("step-00000099\n")
    assert find_checkpoint(folder).name == "step-00000002"


@pytest.mark.parametrize("harm", ["lost", "flipped"])
def test_a_lost_manifest_is_rebuilt_from_the_headers(folder: Path, harm: str) -> None:
    checkpoint = folder / "step-00000002"
    before = read_manifest(checkpoint)
    path = checkpoint / MANIFEST
    if harm == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"step":2', b'"step":7', 1))
    made = rebuild_manifest(checkpoint)
    assert (made.id, made.step, made.tensors) == (before.id, 2, before.tensors)
    assert made.files == before.files
    assert verify_checkpoint(checkpoint) == []
    _load(checkpoint)


def test_rebuilding_finds_damage_that_was_there_before(folder: Path) -> None:
    checkpoint = folder / "step-00000002"
    (checkpoint / MANIFEST).unlink()
    path = checkpoint / "optimizer-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    rebuild_manifest(checkpoint)
    [problem] = verify_checkpoint(checkpoint)
    assert (problem.file, problem.tensor) == (path.name, "c")


def test_rebuilding_refuses_what_is_not_one_save(folder: Path) -> None:
    checkpoint = folder / "step-00000002"
    (checkpoint / MANIFEST).unlink()
    weights = checkpoint / "model-00001-of-00001.safetensors"
    content = weights.read_bytes()
    _foreign(weights, folder / "step-00000001")
    with pytest.raises(
        CheckpointError, match=r"of different saves: .*step 1.*step 2|step 2.*step 1"
    ):
        rebuild_manifest(checkpoint)
    weights.unlink()
    with pytest.raises(CheckpointError, match="lacks model-00001-of-00001"):
        rebuild_manifest(checkpoint)
    weights.write_bytes(content[:-8])
    rebuild_manifest_fails = pytest.raises(CheckpointError, match="does not fit its box")
    with rebuild_manifest_fails:
        rebuild_manifest(checkpoint)
