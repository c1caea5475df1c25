"""The exit codes of verify and diff: 0 is "all is right", 1 is "it is not", 2 is no answer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from holdfast.checkpoint import save
from holdfast.checkpoint.format.files import MANIFEST, crc32c_of
from holdfast.checkpoint.loading import readers
from holdfast.checkpoint.stores import local
from holdfast.launch.cli import application
from holdfast.parallel.errors import HoldfastError

RIGHT, WRONG, OPEN = 0, 1, 2


def state() -> dict:
    torch.manual_seed(0)
    return {"model": torch.nn.Linear(30, 20), "epoch": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    return folder / Path(save(folder, state(), step=1)).name


def code_of(*arguments: str) -> int:
    """The exit code, as the command's own main takes it from errors."""
    try:
        application(arguments[0])(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except HoldfastError as error:
        return error.exit_code
    return 0


def tensors(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, old: bytes, new: bytes) -> None:
    body = (folder / MANIFEST).read_bytes().rpartition(b',"crc32c"')[0]
    assert old in body
    body = body.replace(old, new)
    sealed = body + b',"crc32c":"' + f'{crc32c_of(body):08x}"}}\n'.encode()
    (folder / MANIFEST).write_bytes(sealed)


def save_other(value: float, epoch: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        other = state() | {"epoch": epoch}
        with torch.no_grad():
            other["model"].bias += value
        shutil.rmtree(folder)
        Path(save(folder.parent / "fresh", other, step=1)).rename(folder)

    return make


ENDS: dict[str, tuple[Callable[[Path], object], int, int]] = {
    "as it was": (lambda f: None, RIGHT, RIGHT),
    "saved again": (save_other(0, 3), RIGHT, RIGHT),
    "other weights": (save_other(1, 3), RIGHT, WRONG),
    "another value": (save_other(0, 4), RIGHT, WRONG),
    "a stranger": (lambda f: (f / "x.txt").touch(), WRONG, RIGHT),
    "a flipped bit": (lambda f: flip(tensors(f), -1), WRONG, OPEN),
    "a flipped bit of a header": (lambda f: flip(tensors(f), 20), WRONG, OPEN),
    "a file cut off": (lambda f: os.truncate(tensors(f), 100), WRONG, OPEN),
    "a file missing": (lambda f: tensors(f).unlink(), WRONG, OPEN),
    "a manifest cut off": (lambda f: os.truncate(f / MANIFEST, 100), WRONG, OPEN),
    "a manifest damaged": (lambda f: flip(f / MANIFEST, 30), WRONG, OPEN),
    "a later format": (
        lambda f: edit_manifest(f, b'"format_version":1', b'"format_version":99'), OPEN, OPEN,
    ),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), OPEN, OPEN),
    "an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), OPEN, OPEN),
    "a file in its place": (lambda f: (shutil.rmtree(f), f.write_text("x")), OPEN, OPEN),
    "nothing": (shutil.rmtree, OPEN, OPEN),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDS)
def test_every_end_has_its_code(
    kind: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, verified, compared = ENDS[kind]
    folder = Path(shutil.copytree(saved, tmp_path / "there" / saved.name))
    change(folder)
    assert code_of("verify", str(folder)) == verified
    assert code_of("diff", str(saved), str(folder)) == compared
    assert code_of("diff", str(folder), str(saved)) == compared
    as_text = capsys.readouterr().out
    assert code_of("diff", str(saved), str(folder), "--json") == compared
    if compared != OPEN:
        assert json.loads(capsys.readouterr().out)["equal"] is (compared == RIGHT)
        assert ("identical: " in as_text) is (compared == RIGHT)


@pytest.mark.parametrize("victim", ["manifest", "header", "values", "folder"])
def test_what_cannot_be_read_is_neither_right_nor_damaged(
    victim: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / saved.name))

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    if victim == "values":
        monkeypatch.setattr(readers._native, "FileEngine", _Unreadable)
    elif victim == "folder":
        monkeypatch.setattr(Path, "iterdir", refuse)
    else:
        monkeypatch.setattr(local if victim == "manifest" else readers, "open_regular", refuse)
    assert code_of("verify", str(folder)) == OPEN
    if victim not in ("folder", "header"):
        assert code_of("diff", str(saved), str(folder)) == OPEN


class _Unreadable:
    """A native engine on a drive that fails."""

    def __init__(self, direct: bool) -> None:
        self.direct = direct

    def open(self, path: str) -> int:
        return 1

    def submit(self, requests: list) -> list[int]:
        raise OSError(5, "Input/output error")

    def wait_all(self) -> None: ...

    def close(self) -> None: ...


def test_damage_beside_what_cannot_be_read_is_damage(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / saved.name))
    (folder / "stranger").touch()
    monkeypatch.setattr(readers._native, "FileEngine", _Unreadable)
    assert code_of("verify", str(folder)) == WRONG


def test_a_manifest_is_made_anew_with_every_file(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / saved.name))
    (folder / MANIFEST).unlink()
    for name in ("qwen.tiktoken", "chat_template.jinja", "tokenizer.model.v3"):
        (folder / name).write_text("x")
    assert code_of("verify", str(folder), "--rebuild") == RIGHT
    assert code_of("verify", str(folder)) == RIGHT
    assert code_of("verify", str(tmp_path / "nothing"), "--rebuild") == OPEN
    assert code_of("verify", "s3://bucket/run", "--rebuild") == OPEN
    tensors(folder).write_bytes(b"x")
    assert code_of("verify", str(folder), "--rebuild") == WRONG


def test_a_run_takes_the_newest_checkpoint_without_a_whole_manifest(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest that is whole stays: the run's configuration would be lost with it."""
    folders = [tmp_path / "checkpoints" / f"step-{step:08d}" for step in (1, 2, 3)]
    for folder in folders:
        shutil.copytree(saved, folder)
    before = [(folder / MANIFEST).read_bytes() for folder in folders]
    (folders[0] / MANIFEST).unlink()
    os.truncate(folders[1] / MANIFEST, 100)
    for lost in (folders[1], folders[0]):
        assert code_of("verify", str(tmp_path), "--rebuild") == RIGHT
        assert f"{lost}: made a manifest of " in capsys.readouterr().out
        assert (folders[2] / MANIFEST).read_bytes() == before[2]
    for place in (tmp_path, tmp_path / "checkpoints", folders[2]):
        assert code_of("verify", str(place), "--rebuild") == RIGHT
        assert f"{folders[2]}: its manifest is whole and stays" in capsys.readouterr().out
    assert (folders[2] / MANIFEST).read_bytes() == before[2]


def test_no_name_is_cut_and_each_stands_in_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_long_name_" * 12
    paths = []
    for value in (1.0, 2.0):
        state = {name: torch.full((2, 3), value), "epoch": 3, "notes": ["x"] * 99}
        paths.append(str(save(tmp_path / str(value), state, step=1)))
    assert code_of("inspect", paths[0]) == RIGHT
    short = capsys.readouterr().out
    assert f"state       {name} (tensor), epoch 3, notes (list)" in short.splitlines()
    assert "1 tensors, 24 B, F32" in short
    assert code_of("inspect", paths[0], "--tensors") == RIGHT
    *_, header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["dtype", "shape", "size", "pieces", "files", "tensor"]
    assert line.split() == ["F32", "2x3", "24", "B", "1", "1", name]
    assert code_of("diff", *paths) == WRONG
    said = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert said == [
        f"of other values: {name}: 6 of 6 elements, by 1 at most; the difference's norm is 1 of A's"
    ]


def test_what_is_not_there_is_no_answer(tmp_path: Path) -> None:
    for command in (("inspect",), ("verify",), ("diff", str(tmp_path)), ("prove", str(tmp_path))):
        assert code_of(*command, str(tmp_path / "nothing")) == OPEN
