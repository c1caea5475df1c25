"""What lies in a run's folder is gone on from, refused by name, or kept beside: never lost in
silence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.tools import rebuild_manifest, verify_checkpoint
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.run import RunRequest
from support.runs.kept_runs import open_and_end, save_as_run
from support.runs.small_runs import make_config

STEPS = (3, 6, 9)
NAMES = [f"step-{step:08}" for step in STEPS]


@pytest.fixture
def request_(tmp_path: Path) -> RunRequest:
    """A run that has taken nine steps and saved three times."""
    made = RunRequest(tmp_path / "name.toml", make_config(), out=tmp_path / "run")
    open_and_end(made)
    (tmp_path / "run/metrics.jsonl").write_text(
        "".join(f'{{"step": {n}, "loss_hex": "0x1p+0"}}\n' for n in range(1, 10))
    )
    (tmp_path / "run/events.jsonl").write_text(
        "".join(
            f'{{"time": 1.0, "event": "checkpoint_committed", "tier": "disk", "step": {n}}}\n'
            for n in STEPS
        )
    )
    save_as_run(tmp_path / "run/checkpoints", made.config, *STEPS)
    return made


@pytest.fixture
def checkpoints(request_: RunRequest) -> Path:
    assert request_.out is not None
    return request_.out / "checkpoints"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_whose_manifests_are_all_gone_stops_and_names_the_repair(
    request_: RunRequest, checkpoints: Path
) -> None:
    for name in NAMES:
        (checkpoints / name / "manifest.json").unlink()
    before = content(checkpoints)
    newest = checkpoints / NAMES[-1]
    with pytest.raises(ConfigError, match=rf"`holdfast verify --rebuild {newest}`"):
        open_and_end(request_)
    assert content(checkpoints) == before
    rebuild_manifest(newest)
    assert verify_checkpoint(newest) == []


def test_a_newer_checkpoint_without_a_manifest_is_not_passed_over(
    request_: RunRequest, checkpoints: Path
) -> None:
    (checkpoints / NAMES[-1] / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=f"{NAMES[-1]} has no manifest.json"):
        open_and_end(request_)
    (checkpoints / NAMES[0] / "manifest.json").unlink()
    shutil.rmtree(checkpoints / NAMES[-1])
    open_and_end(request_)  # the older one without a manifest does not matter


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "tells of a checkpoint of step 9, and there is none in"),
        (
            lambda root: [(root / n / "manifest.json").write_text("{") for n in NAMES],
            f"{NAMES[-1]} cannot be resumed from",
        ),
    ],
    ids=["gone", "damaged"],
)
def test_a_run_whose_checkpoints_cannot_be_used_stops_until_it_is_told_to_start_over(
    request_: RunRequest, checkpoints: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(checkpoints)
    before = content(checkpoints)
    with pytest.raises(ConfigError, match=said) as told:
        open_and_end(request_)
    assert "start over with --resume none" in str(told.value)
    assert content(checkpoints) == before


def test_a_start_over_keeps_what_was_there_beside(request_: RunRequest, checkpoints: Path) -> None:
    root = checkpoints.parent
    metrics = (root / "metrics.jsonl").read_text()
    [note] = open_and_end(request_, resume="none")
    kept = {path.name for path in root.glob("superseded-*")}
    assert len(kept) == 3
    assert all(name in note for name in kept)
    [records] = root.glob("superseded-metrics.jsonl*")
    assert records.read_text() == metrics
    [saved] = root.glob("superseded-checkpoints*")
    assert LocalStore(saved).names() == NAMES
    assert not checkpoints.exists()


def test_another_run_does_not_go_on_where_one_without_checkpoints_was(
    request_: RunRequest, checkpoints: Path
) -> None:
    shutil.rmtree(checkpoints)
    other = RunRequest(request_.path, make_config(train={"seed": 7}), out=request_.out)
    with pytest.raises(
        ConfigError, match=r"already holds another run \(it differs in train.seed\)"
    ):
        open_and_end(other)
