"""Publishing beside other publishers: what is committed stays, and what verifies is kept."""

from __future__ import annotations

import os
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from holdfast.checkpoint import Checkpointer, load, save
from holdfast.checkpoint.format.content import same_content
from holdfast.checkpoint.format.files import (
    MANIFEST,
    FileEntry,
    Manifest,
    PieceEntry,
    TensorEntry,
    crc32c_of,
)
from holdfast.checkpoint.format.names import PARTIAL, attempt_of
from holdfast.checkpoint.format.plan_types import HeldBox, SavedTensor
from holdfast.checkpoint.manager import CheckpointManager, ManagerSettings
from holdfast.checkpoint.saving.arena import Cancelled
from holdfast.checkpoint.saving.coordination import Members
from holdfast.checkpoint.saving.job import SaveJob
from holdfast.checkpoint.saving.write_plan import make_write_plan
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.stores.protocol import CheckpointStore, Retention, commit
from holdfast.checkpoint.stores.registry import open_store
from holdfast.checkpoint.tiers.uploader import Uploader
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.parallel.layout import Box

NAME = "step-00000010"
ROWS = 600


def _values(step: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((300, 70), float(step))}


def _written(store: LocalStore, tmp_path: Path, step: int, name: str = NAME) -> bytes:
    """Write a checkpoint's files as an attempt does; returns its manifest."""
    source = save(tmp_path / f"source-{step}-{name}", _values(step), step=10)
    store.begin(name)
    for file in source.iterdir():
        if file.name != MANIFEST:
            store.put(file, name, file.name)
    return (source / MANIFEST).read_bytes()


def _attempt(folder: Path, generation: int) -> LocalStore:
    return LocalStore(folder, attempt_of(generation, 1, f"{generation}" * 32), generation)


def _unfinished(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if PARTIAL in path.name)


def test_attempts_to_save_a_step_share_no_folder(tmp_path: Path) -> None:
    first, second = _attempt(tmp_path, 1), _attempt(tmp_path, 2)
    _written(first, tmp_path, 1)
    manifest = _written(second, tmp_path, 2)
    second.discard(NAME)
    assert _unfinished(tmp_path) == [first.partial(NAME).name], "each removes its own files only"
    assert "g1-s1-" in first.partial(NAME).name
    second.begin(NAME)
    with pytest.raises(FileNotFoundError):
        commit(LocalStore(tmp_path / "nowhere"), NAME, manifest)


def test_a_committed_checkpoint_of_the_same_content_stays(tmp_path: Path) -> None:
    first, second = _attempt(tmp_path, 1), _attempt(tmp_path, 2)
    assert commit(first, NAME, _written(first, tmp_path, 1)) == ""
    before = os.stat(tmp_path / NAME / MANIFEST).st_ino
    assert commit(second, NAME, _written(second, tmp_path, 1)) == ""
    assert os.stat(tmp_path / NAME / MANIFEST).st_ino == before
    assert first.names() == [NAME]
    assert not _unfinished(tmp_path)


def test_a_committed_checkpoint_of_other_content_is_set_aside(tmp_path: Path) -> None:
    first, second = _attempt(tmp_path, 1), _attempt(tmp_path, 2)
    commit(first, NAME, _written(first, tmp_path, 1))
    note = commit(second, NAME, _written(second, tmp_path, 2))
    assert note == f"{tmp_path / NAME} had other content, and is superseded-{NAME} now"
    for name, step in ((NAME, 2), (f"superseded-{NAME}", 1)):
        assert verify_checkpoint(tmp_path / name) == []
        found = _values(0)
        load(tmp_path / name, found)
        assert torch.equal(found["a"], _values(step)["a"])


def test_a_damaged_checkpoint_of_the_same_content_does_not_count(tmp_path: Path) -> None:
    first, second = _attempt(tmp_path, 1), _attempt(tmp_path, 2)
    commit(first, NAME, _written(first, tmp_path, 1))
    [file] = (tmp_path / NAME).glob("*.safetensors")
    os.truncate(file, 100)
    assert "superseded" in commit(second, NAME, _written(second, tmp_path, 1))
    assert verify_checkpoint(tmp_path / NAME) == []


def test_what_comes_between_the_look_and_the_rename_is_not_replaced(tmp_path: Path) -> None:
    first, second = _attempt(tmp_path, 1), _attempt(tmp_path, 2)
    manifest, others = _written(first, tmp_path, 1), _written(second, tmp_path, 2)
    asked = []

    def claim() -> None:
        asked.append(True)
        if len(asked) == 1:  # all is synced; the rename comes next
            commit(second, NAME, others)

    with pytest.raises(FileExistsError):
        first.publish(NAME, manifest, claim)
    found = _values(0)
    load(tmp_path / NAME, found)
    assert torch.equal(found["a"], _values(2)["a"])


@pytest.mark.parametrize("given_up_at", [1, 2])
def test_a_save_that_was_given_up_touches_nothing_of_the_others(
    tmp_path: Path, given_up_at: int
) -> None:
    """Given up before the rename, or while it is under way."""
    older = save(tmp_path, _values(5), step=5)
    late = _attempt(tmp_path, 1)
    manifest = _written(late, tmp_path, 1)
    asked = []

    def claim() -> None:
        asked.append(True)
        if len(asked) == given_up_at:
            raise Cancelled

    with pytest.raises(Cancelled):
        commit(late, NAME, manifest, retention=Retention(1), claim=claim)
    assert verify_checkpoint(older) == [], "it is the last one that the others know"
    assert late.latest() == older.name
    assert late.has(NAME) == (given_up_at == 2)


def test_retention_keeps_what_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, _values(step), step=step)
    [file] = (tmp_path / "step-00000003").glob("*.safetensors")
    os.truncate(file, 100)
    store = LocalStore(tmp_path)
    assert store.retain(1) == ["step-00000001"], "the newest is not whole: the one before is kept"
    (tmp_path / "step-00000003" / MANIFEST).write_bytes(b"{")
    assert store.retain(1) == []
    save(tmp_path, _values(4), step=4)
    assert store.retain(1) == ["step-00000002", "step-00000003"]
    assert not _unfinished(tmp_path)


def test_retention_spares_what_was_just_committed(tmp_path: Path) -> None:
    save(tmp_path, _values(9), step=90)
    store = _attempt(tmp_path, 1)
    commit(store, NAME, _written(store, tmp_path, 1), retention=Retention(1))
    assert store.names() == [NAME, "step-00000090"]


def test_a_sweep_spares_what_a_live_save_writes(tmp_path: Path) -> None:
    dead, alive = _attempt(tmp_path, 3), LocalStore(tmp_path, "g3-s2-other", 3)
    dead.begin(NAME)
    (tmp_path / f"{NAME}{PARTIAL}").mkdir()
    (tmp_path / f"{NAME}.replaced{PARTIAL}").mkdir()
    alive.begin(NAME)
    with alive.written(NAME):
        _attempt(tmp_path, 3).sweep()
        assert _unfinished(tmp_path) == [alive.partial(NAME).name]
        _attempt(tmp_path, 4).sweep()
        assert not _unfinished(tmp_path), "a later generation has given it up"
    (tmp_path / "step-00000011").mkdir()
    (tmp_path / "stranger.partial").mkdir()
    _attempt(tmp_path, 4).sweep()
    assert len(list(tmp_path.iterdir())) == 2, "what is not known as a leftover stays"


def _manifest(cuts: list[int], values: bytes, columns: int = 7) -> Manifest:
    row = columns * 4
    edges = [0, *cuts, ROWS]
    pieces = tuple(
        PieceEntry(
            a * row, (b - a) * row, (a, 0), (b, columns), crc32c_of(values[a * row : b * row])
        )
        for a, b in pairwise(edges)
    )
    tensors = {"w": TensorEntry("weight", "F32", (ROWS, columns))}
    files = {"f": FileEntry(bytes=ROWS * row, crc32c=1, pieces={"w": pieces})}
    return Manifest(id=os.urandom(4).hex(), step=1, created=0.0, tensors=tensors, files=files)


def test_content_is_compared_whatever_the_layout() -> None:
    values = os.urandom(ROWS * 28)
    whole = _manifest([], values)
    assert same_content(whole, _manifest([], values))
    assert same_content(_manifest([100, 101, 350], values), _manifest([64], values))
    other = bytearray(values)
    other[-1] ^= 1
    assert not same_content(whole, _manifest([], bytes(other)))
    assert not same_content(_manifest([9], values), _manifest([64], bytes(other)))
    assert not same_content(whole, _manifest([], values, columns=1))


def _saving(folder: Path, step: int, generation: int, **more: Any) -> CheckpointManager:
    """One rank of a generation that begins to save."""
    values = torch.full((ROWS, 7), float(step))
    whole = Box((0, 0), (ROWS, 7))
    parts = (HeldBox(whole, (0,)),)
    plan = make_write_plan([SavedTensor("w", "weight", "F32", (ROWS, 7), parts, False)], (0,))
    members = Members(0, (0,), HashStore(), generation)
    manager = CheckpointManager(members, ManagerSettings(timeout_s=60))
    store, tensor = LocalStore(folder), values
    manager.save(SaveJob(step, store, "disk", plan, lambda name, box: tensor[box.slices], **more))
    return manager


def test_a_coordinator_whose_disk_is_slow_publishes_nothing_after_the_others_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step is saved again while the first coordinator syncs; one checkpoint is kept."""
    syncing, go_on, sync = threading.Event(), threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        if "g1-s1-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            syncing.set()
            assert go_on.wait(30)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    folder = tmp_path / "c"
    before = _saving(folder, 10, 1, retention=Retention(1))
    assert syncing.wait(30)
    before.abort("rank 3 is lost")
    after = _saving(folder, 10, 2, retention=Retention(1))
    assert after.finish()
    [saved] = after.results()
    assert saved.error == ""
    go_on.set()
    deadline = time.monotonic() + 30
    while before.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    [lost] = before.results()
    assert "rank 3 is lost" in lost.error
    assert verify_checkpoint(folder / NAME) == []
    assert sorted(path.name for path in folder.iterdir()) == ["latest", NAME]
    before.close()
    after.close()


def test_a_program_that_saves_a_step_again_keeps_both_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = _values(1)
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(10, wait=True)
        checkpointer.save(10, wait=True)
        assert not caplog.records, "the same again is nothing to say"
        state["a"].fill_(2.0)
        checkpointer.save(10, wait=True)
    assert f"superseded-{NAME}" in caplog.text
    found = _values(0)
    load(tmp_path / f"superseded-{NAME}", found)
    assert torch.equal(found["a"], _values(1)["a"])


@pytest.mark.parametrize("form", ["file://{}/far", "memory://publish/{}"])
def test_an_upload_replaces_no_file_of_a_committed_checkpoint(tmp_path: Path, form: str) -> None:
    place = form.format(tmp_path)

    def upload(folder: Path, step: int) -> CheckpointStore:
        target = open_store(place)
        uploader = Uploader(target, Members(0, (0,), HashStore()))
        uploader.start(save(folder, _values(step), step=10))
        uploader.close()
        assert [result.error for result in uploader.results()] == [""]
        return target

    target = upload(tmp_path / "first", 1)
    manifest = target.manifest(NAME)
    assert upload(tmp_path / "again", 1).manifest(NAME).id == manifest.id, "it is there already"
    upload(tmp_path / "other", 2)
    for name, step in ((NAME, 2), (f"superseded-{NAME}", 1)):
        assert verify_checkpoint(f"{place}/{name}") == []
        found = _values(0)
        load(f"{place}/{name}", found)
        assert torch.equal(found["a"], _values(step)["a"])
    assert target.names() == [NAME]
