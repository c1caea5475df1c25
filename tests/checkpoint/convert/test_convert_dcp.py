"""What FSDP2 saves on 4 ranks goes to holdfast and back, and FSDP2 goes on from it on 3."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import load
from holdfast.checkpoint.stores.registry import read_manifest
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.parallel.errors import CheckpointError
from support.foreign.conversions import converted
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, run_in


@pytest.fixture(scope="module")
def saved(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("fsdp") / "dcp"
    results = cluster.run("support.foreign.dcp_jobs:run_fsdp", 4, folder=str(folder))
    return folder, results[0]


@pytest.mark.mp
@pytest.mark.slow
def test_fsdp_goes_on_from_a_round_trip_on_another_number_of_ranks(
    cluster: Cluster, tmp_path: Path, saved: tuple[Path, Any]
) -> None:
    source, told = saved
    there = converted(source, tmp_path / "ours", "holdfast")
    assert there.source_format == "dcp"
    assert there.step == 3
    assert verify_checkpoint(tmp_path / "ours") == []
    tensors = {name: torch.zeros_like(value) for name, value in told["tensors"].items()}
    load(tmp_path / "ours", tensors)
    for name, value in told["tensors"].items():
        assert torch.equal(tensors[name], value), name
    converted(tmp_path / "ours", tmp_path / "back", "dcp")
    again = cluster.run(
        "support.foreign.dcp_jobs:run_fsdp", 3, folder="", load=str(tmp_path / "back")
    )[0]
    for name, value in told["tensors"].items():
        assert torch.equal(again["tensors"][name], value), name
    native = cluster.run("support.foreign.dcp_jobs:run_fsdp", 3, folder="", load=str(source))[0]
    assert again["losses"] == native["losses"]


@pytest.mark.mp
@pytest.mark.slow
def test_a_run_of_ours_is_read_by_torch(cluster: Cluster, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    config = make_config(
        train={"steps": 2, "precision": "bf16"}, checkpoint={"every": 2}, parallel={"data": 2}
    )
    run_in(cluster, config, tmp_path / "run")
    converted(tmp_path / "run", tmp_path / "dcp", "dcp")
    manifest = read_manifest(tmp_path / "run/checkpoints/step-00000002")
    ours = {
        entry_name: torch.zeros(
            entry.shape, dtype=torch.bfloat16 if entry.dtype == "BF16" else torch.float32
        )
        for entry_name, entry in manifest.tensors.items()
    }
    load(tmp_path / "run/checkpoints/step-00000002", ours)
    weights = {n: e for n, e in manifest.tensors.items() if e.kind == "weight"}
    state: dict[str, Any] = {
        "model": {name: torch.zeros_like(ours[name]) for name in weights},
        "optim": {
            "state": {
                name: {
                    "exp_avg": torch.zeros(entry.shape),
                    "exp_avg_sq": torch.zeros(entry.shape),
                    "step": torch.zeros(()),
                }
                for name, entry in weights.items()
            }
        },
    }
    dcp.load(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    for name in weights:
        assert torch.equal(state["model"][name], ours[name])
        kept = state["optim"]["state"][name]
        assert torch.equal(kept["exp_avg"], ours[f"exp_avg.{name}"])
        assert kept["step"].item() == 2
    back = converted(tmp_path / "dcp", tmp_path / "again", "holdfast")
    assert back.step == 2
    assert back.tensors["master"] == back.tensors["weight"] == len(weights)
    masters = {n: torch.zeros_like(v) for n, v in ours.items() if n.startswith("master.")}
    load(tmp_path / "again", masters)
    assert all(torch.equal(value, ours[name]) for name, value in masters.items())


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.mp
@pytest.mark.slow
def test_damage_and_malice_are_named(tmp_path: Path, saved: tuple[Path, Any]) -> None:
    source, _ = saved

    def copy(name: str) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    missing = copy("missing")
    (missing / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp cannot be read"):
        converted(missing, tmp_path / "out", "holdfast")
    short = copy("short")
    content = (short / "__2_0.distcp").read_bytes()
    (short / "__2_0.distcp").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"__2_0\.distcp is truncated"):
        converted(short, tmp_path / "out", "holdfast")
    evil = copy("evil")
    (evil / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "touched")))
    with pytest.raises(
        CheckpointError, match=r"evil/\.metadata is refused: its pickle asks for pathlib"
    ):
        converted(evil, tmp_path / "out", "holdfast", source_format="dcp")
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "out").exists()
