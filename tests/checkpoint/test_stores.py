"""Stores: one protocol for folders and URLs, one order of a commit, one line for another store."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from holdfast.checkpoint import load, save
from holdfast.checkpoint.format.files import MANIFEST, Manifest, decode_manifest
from holdfast.checkpoint.format.names import step_of
from holdfast.checkpoint.loading.read_plan import ReadRequest
from holdfast.checkpoint.saving.coordination import Members
from holdfast.checkpoint.stores import registry
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.stores.protocol import CheckpointStore, Retention, commit, newest
from holdfast.checkpoint.stores.registry import checkpoint_at, find_checkpoint, open_store
from holdfast.checkpoint.stores.remote import FsspecStore
from holdfast.checkpoint.tiers.uploader import Uploader
from holdfast.checkpoint.tools.diff import diff_checkpoints
from holdfast.checkpoint.tools.inspect import inspect_checkpoint
from holdfast.checkpoint.tools.verify import rebuild_manifest, verify_checkpoint
from holdfast.parallel.errors import CheckpointError, ConfigError


def _state(step: int) -> dict[str, Any]:
    return {"a": torch.full((300, 70), float(step)), "b": torch.arange(5), "note": "x"}


def _upload(folder: Path, place: str, *steps: int, keep: int = 0) -> CheckpointStore:
    """Save steps to a folder and upload them, as a run of one rank does."""
    target = open_store(place)
    uploader = Uploader(target, Members(0, (0,), HashStore()), keep=keep)
    for step in steps:
        uploader.start(save(folder, _state(step), step=step))
    uploader.close()
    assert [result.error for result in uploader.results()] == [""] * len(steps)
    return target


PLACES = ["file://{}/far", "memory://far/{}"]


@pytest.mark.parametrize("form", PLACES)
def test_what_is_uploaded_is_verified_compared_and_loaded_at_its_url(
    tmp_path: Path, form: str
) -> None:
    place = form.format(tmp_path)
    store = _upload(tmp_path / "near", place, 1, 2)
    assert store.names() == ["step-00000001", "step-00000002"]
    assert find_checkpoint(place).name == "step-00000002"
    assert find_checkpoint(f"{place}/latest").name == "step-00000002"
    one, two = f"{place}/step-00000001", f"{place}/step-00000002"
    assert verify_checkpoint(one) == []
    assert inspect_checkpoint(two).step == 2
    assert diff_checkpoints(two, tmp_path / "near/step-00000002").equal
    found = diff_checkpoints(one, two)
    assert [value.name for value in found.values] == ["a"]
    state = _state(0)
    loaded = load(one, state)
    assert loaded["note"] == "x"
    assert torch.equal(loaded["a"], state["a"])
    assert torch.equal(state["a"], _state(1)["a"])


def test_damage_behind_a_url_is_found(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/far"
    _upload(tmp_path / "near", place, 1)
    folder = tmp_path / "far/step-00000001"
    [file] = folder.glob("optimizer-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (folder / "stranger").write_text("")
    messages = [str(problem) for problem in verify_checkpoint(f"{place}/step-00000001")]
    assert any("is damaged: checksum" in message for message in messages)
    assert any(message.startswith("stranger: is not part") for message in messages)
    file.unlink()
    messages = [str(problem) for problem in verify_checkpoint(f"{place}/step-00000001")]
    assert f"{file.name}: is missing" in messages


def test_the_commands_take_urls(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/far"
    _upload(tmp_path / "near", place, 1, 2)
    from typer.testing import CliRunner

    from holdfast.launch.cli import application

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(application(arguments[0]), arguments)
        return done.exit_code, done.output

    code, printed = run("verify", place)
    assert code == 0, printed
    assert f"{place}/step-00000002: all " in printed.replace("\n", "")
    assert run("diff", place, str(tmp_path / "near"))[0] == 0
    assert run("diff", f"{place}/step-00000001", f"{place}/step-00000002")[0] == 1
    [file] = (tmp_path / "far/step-00000002").glob("optimizer-*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    assert run("verify", place)[0] == 1


@pytest.mark.parametrize(
    ("place", "folder", "name"),
    [
        ("runs/a/step-00000003", "runs/a", "step-00000003"),
        ("step-00000003", ".", "step-00000003"),
        ("/x/model/", "/x", "model"),
        (".", str(Path.cwd().parent), Path.cwd().name),
    ],
)
def test_a_path_names_a_folder_and_a_checkpoint(place: str, folder: str, name: str) -> None:
    found = checkpoint_at(place)
    assert (found.store, found.name) == (LocalStore(Path(folder)), name)


@pytest.mark.parametrize(
    ("place", "url", "name"),
    [
        ("file:///x/run/step-00000003", "file:///x/run", "step-00000003"),
        ("memory://run/step-00000003/", "memory://run", "step-00000003"),
        ("memory://run", "memory://run", ""),
    ],
)
def test_a_url_names_a_folder_and_a_checkpoint(place: str, url: str, name: str) -> None:
    found = checkpoint_at(place)
    assert isinstance(found.store, FsspecStore)
    assert (found.store.url, found.name) == (url, name)


def test_a_place_without_a_checkpoint_is_an_error_that_names_it(tmp_path: Path) -> None:
    for place in (str(tmp_path), f"file://{tmp_path}/none", "memory://nothing"):
        with pytest.raises(CheckpointError, match="is not a checkpoint, and there is none in it"):
            find_checkpoint(place)
    with pytest.raises(ConfigError, match="tape://x"):
        find_checkpoint("tape://x/y")


@pytest.mark.parametrize("place", ["s3:/bucket/run", "foo:/x", "s3://", "://x"])
def test_what_was_meant_for_a_url_is_not_taken_for_a_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for attempt in (open_store, checkpoint_at, find_checkpoint):
        with pytest.raises(ConfigError, match=re.escape(place)):
            attempt(place)
    for folder in (place, "s3://bucket/run"):
        with pytest.raises(ConfigError, match=r"folder = .*: a URL cannot be used here"):
            save(folder, {"a": torch.ones(1)})
    assert not list(tmp_path.iterdir())


class Recorder:
    """A store that keeps nothing but the order in which it is written."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            said = [str(a) for a in arguments if isinstance(a, str | int)]
            self.calls.append(" ".join([name, *said]))
            if name == "retain":
                raise OSError("busy")

        return call


def test_a_commit_has_one_order_in_every_store() -> None:
    store: Any = Recorder()
    commit(store, "s", b"", files={"a": b"", "b": b""}, retention=Retention(3))
    wanted = ["write s a", "write s b", "publish s", "point_latest s", "retain 3"]
    assert store.calls == wanted, "and a checkpoint stands though an old one could not be removed"


def test_retention_spares_what_is_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, _state(step), step=step)
    store = LocalStore(tmp_path)
    assert store.retain(0) == []
    assert store.retain(1, {"step-00000002"}) == ["step-00000001", "step-00000003"]
    assert store.names() == ["step-00000002", "step-00000004"]


def _moved_to_another_disk(folder: Path, name: str, disk: Path) -> Path:
    """Move a checkpoint away and leave a link in its place, as people do who need room."""
    disk.mkdir(exist_ok=True)
    (folder / name).rename(disk / name)
    (folder / name).symlink_to(disk / name)
    return disk / name


def test_of_a_checkpoint_that_is_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for step in (1, 2):
        save(folder, _state(step), step=step)
    moved = [_moved_to_another_disk(folder, f"step-0000000{n}", tmp_path / "disk") for n in (1, 2)]
    before = [sorted(path.name for path in place.iterdir()) for place in moved]
    (folder / "step-00000006").symlink_to(tmp_path / "away")  # to a disk that is not mounted
    for step in (3, 4, 5):
        save(folder, _state(step), step=step)
        LocalStore(folder).retain(2)
    (folder / "step-00000006").unlink()
    assert [path.name for path in folder.iterdir() if path.is_symlink()] == []
    assert LocalStore(folder).names() == ["step-00000004", "step-00000005"]
    assert [sorted(path.name for path in place.iterdir()) for place in moved] == before
    assert [verify_checkpoint(place) for place in moved] == [[], []]


def test_a_folder_that_lost_its_manifest_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        path = save(tmp_path, _state(step), step=step)
        (path / MANIFEST).unlink()
    save(tmp_path, _state(7), step=2)
    save(tmp_path, _state(3), step=3)
    LocalStore(tmp_path).retain(1)
    assert LocalStore(tmp_path).names() == ["step-00000003"]
    for name, step in (("step-00000001", 1), ("superseded-step-00000002", 2)):
        rebuild_manifest(tmp_path / name)
        state = {key: value for key, value in _state(0).items() if key != "note"}
        load(tmp_path / name, state)
        assert torch.equal(state["a"], _state(step)["a"])


@pytest.mark.parametrize("left", ["step-00000001.partial", "step-00000001.replaced.partial"])
def test_what_an_interrupted_save_or_removal_left_goes_with_the_next_save(
    tmp_path: Path, left: str
) -> None:
    path = save(tmp_path, _state(1), step=1)
    path.rename(tmp_path / left)
    (tmp_path / "notes.partial").mkdir()
    save(tmp_path, _state(2), step=2)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"step-00000002", "latest", "notes.partial"}


class DictReader:
    """Reads a checkpoint of a `DictStore`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def read(self, requests: Sequence[ReadRequest], address: int) -> Iterator[int]:
        for number, asked in enumerate(requests):
            content = self._files[asked.file][asked.offset : asked.offset + asked.length]
            ctypes.memmove(asked.address(address), content, asked.length)
            yield number

    def read_file(self, name: str, length: int | None = None) -> bytes:
        return self._files[name][:length]

    def size(self, name: str) -> int:
        return len(self._files[name])

    def close(self) -> None:
        pass


class DictStore:
    """A store of one's own: all that another kind of storage takes."""

    def __init__(self, place: str, objects: dict[str, dict[str, bytes]]) -> None:
        self._place, self._objects = place, objects

    def place_of(self, name: str) -> str:
        return f"{self._place}/{name}"

    def names(self) -> list[str]:
        return sorted(n for n in self._objects if step_of(n) is not None and self.has(n))

    def has(self, name: str) -> bool:
        return MANIFEST in self._objects.get(name, {})

    def latest(self) -> str:
        return self._objects.get("latest", {}).get("", b"").decode()

    def manifest(self, name: str) -> Manifest:
        return decode_manifest(self._objects[name][MANIFEST], self.place_of(name))

    def files(self, name: str) -> dict[str, int]:
        return {file: len(content) for file, content in self._objects[name].items()}

    def reader(self, name: str) -> DictReader:
        return DictReader(self._objects[name])

    def begin(self, name: str) -> None:
        self._objects.setdefault(name, {})

    def put(self, source: Path, name: str, file: str) -> None:
        self._objects[name][file] = source.read_bytes()

    def write(self, name: str, file: str, content: bytes) -> None:
        self._objects[name][file] = content

    def discard(self, name: str) -> None:
        if not self.has(name):
            del self._objects[name]

    def publish(self, name: str, manifest: bytes, claim: Callable[[], None]) -> None:
        claim()
        if self.has(name):
            raise FileExistsError(name)
        self.write(name, MANIFEST, manifest)

    def set_aside(self, name: str) -> str:
        self._objects[f"superseded-{name}"] = self._objects.pop(name)
        return f"superseded-{name}"

    def point_latest(self, name: str) -> None:
        self._objects["latest"] = {"": name.encode()}

    def best(self) -> str:
        return self._objects.get("best", {}).get("", b"").decode()

    def point_best(self, name: str) -> None:
        self._objects["best"] = {"": name.encode()}

    def retain(self, keep: int, protected: Collection[str] = ()) -> list[str]:
        removed = [n for n in self.names()[:-keep] if n not in protected] if keep else []
        for name in removed:
            del self._objects[name]
        return removed


def test_another_store_is_one_class_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects: dict[str, dict[str, bytes]] = {}
    line: Any = {"dict": lambda place: DictStore(place, objects)}
    monkeypatch.setattr(registry, "STORES", {**registry.STORES, **line})
    store = _upload(tmp_path, "dict://d", 1, 2, 3, keep=2)
    assert store.names() == ["step-00000002", "step-00000003"]
    assert newest(store) == "step-00000003"
    assert verify_checkpoint("dict://d/step-00000002") == []
    assert inspect_checkpoint(find_checkpoint("dict://d").place).step == 3
    state = _state(0)
    load("dict://d/latest", state)
    assert torch.equal(state["a"], _state(3)["a"])


@pytest.mark.mp
def test_places_are_read_without_torch() -> None:
    code = (
        "import sys; from holdfast.checkpoint.stores import find_checkpoint, open_store;"
        "open_store('.'); open_store('memory://x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, timeout=60)
