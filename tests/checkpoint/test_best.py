"""The best checkpoints stay beside the newest, and `best` names the first, in every store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.distributed import HashStore

from holdfast.checkpoint import load, save
from holdfast.checkpoint.format.files import MANIFEST, encode_manifest
from holdfast.checkpoint.saving.coordination import Members
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.stores.protocol import (
    Best,
    CheckpointStore,
    Retention,
    apply_retention,
    best_names,
)
from holdfast.checkpoint.stores.registry import find_checkpoint, open_store
from holdfast.checkpoint.tiers.uploader import Uploader

LOSSES: list[Any] = [3.0, 2.0, 2.5, 2.0, 1.0, None, float("nan"), "low", 4.0]
"""By step, from 1 on; a number or what else a manifest may say."""


def saved(folder: Path, step: int, losses: Any) -> Path:
    """A checkpoint whose manifest says these losses."""
    path = save(folder, {"a": torch.full((30, 7), float(step))}, step=step)
    store = LocalStore(folder)
    manifest = store.manifest(path.name)
    scalars = {**manifest.scalars, **({} if losses is None else {"validation": losses})}
    changed = msgspec.structs.replace(manifest, scalars=scalars) if losses is not None else manifest
    (path / MANIFEST).write_bytes(encode_manifest(changed))
    return path


def steps(store: CheckpointStore) -> list[int]:
    return [int(name.removeprefix("step-")) for name in store.names()]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    for number, loss in enumerate(LOSSES):
        saved(tmp_path, number + 1, None if loss is None else {"code": loss, "other": -9.0})
    return LocalStore(tmp_path)


def test_the_lowest_losses_are_best_and_of_equal_ones_the_older(store: LocalStore) -> None:
    found = best_names(store, Best(4, "code"))
    assert found == [f"step-{step:08d}" for step in (5, 2, 4, 3)]
    assert len(best_names(store, Best(100, "code"))) == 6
    assert best_names(store, Best(4, "text")) == []


def test_newest_and_best_stay_and_the_best_is_named(store: LocalStore) -> None:
    apply_retention(store, "step-00000009", Retention(2, best=Best(2, "code")))
    assert steps(store) == [2, 5, 8, 9]
    assert (store.root / "best").read_text() == "step-00000005\n"
    assert find_checkpoint(f"{store.root}/best").name == "step-00000005"
    state = {"a": torch.zeros(30, 7)}
    load(f"{store.root}/best", state)
    assert state["a"][0, 0] == 5.0


def test_one_that_lost_a_file_is_not_the_best(store: LocalStore) -> None:
    for path in store.path("step-00000005").glob("*.safetensors"):
        path.unlink()
    assert best_names(store, Best(1, "code")) == ["step-00000002"]


def test_losses_that_are_no_table_are_none(tmp_path: Path) -> None:
    saved(tmp_path, 1, [1.0])
    saved(tmp_path, 2, 1.0)
    assert best_names(LocalStore(tmp_path), Best(1, "code")) == []


def test_a_name_that_was_not_written_whole_goes(store: LocalStore) -> None:
    (store.root / ".best.partial").write_text("step-")
    store.sweep()
    assert not (store.root / ".best.partial").exists()


@pytest.mark.parametrize("place", ["file://{}/far", "memory://best/{}"])
def test_the_best_stay_at_a_url_as_well(tmp_path: Path, place: str) -> None:
    target = open_store(place.format(tmp_path))
    uploader = Uploader(target, Members(0, (0,), HashStore()), keep=1, best=Best(1, "code"))
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), start=1):
        uploader.start(saved(tmp_path / "near", step, {"code": loss}))
    uploader.close()
    assert [result.error for result in uploader.results()] == [""] * 4
    assert steps(target) == [2, 4]
    assert target.best() == "step-00000002"
    assert find_checkpoint(f"{place.format(tmp_path)}/best").name == "step-00000002"
