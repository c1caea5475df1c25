"""What Megatron-Core saves for 2 x 2 ranks, in both forms, against its shards joined by torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.checkpoint import load
from holdfast.checkpoint.stores.registry import read_manifest
from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.parallel.errors import CheckpointError, ConfigError
from support.foreign.conversions import converted
from support.foreign.megatron_jobs import ITERATION, SIZES
from support.foreign.megatron_shards import huggingface_weights
from support.processes.cluster import Cluster

pytestmark = [pytest.mark.mp, pytest.mark.slow]


@pytest.fixture(scope="module")
def saved_models(
    megatron_pool: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("megatron")
    return root, megatron_pool.run(
        "support.foreign.megatron_jobs:save", 4, tensor=2, pipeline=2, root=str(root)
    )


KINDS = ("untied", "tied", "experts")


@pytest.fixture(params=KINDS)
def saved(
    request: pytest.FixtureRequest, saved_models: tuple[Path, list[Any]]
) -> tuple[Path, list[dict[str, Any]]]:
    root, shards = saved_models
    number = KINDS.index(request.param)
    return root / request.param, [shard[number] for shard in shards]


FORMS = [(kind, form) for kind in KINDS for form in ("dist", "legacy")]


@pytest.mark.parametrize(("saved", "form"), [*FORMS, ("experts", "single")], indirect=["saved"])
def test_every_weight_is_what_megatrons_shards_make_up(
    tmp_path: Path, saved: tuple[Path, list[dict[str, Any]]], form: str
) -> None:
    root, shards = saved
    done = converted(root / form, tmp_path / "ours", "holdfast")
    assert (done.source_format, done.step) == ("megatron", ITERATION)
    assert verify_checkpoint(tmp_path / "ours") == []
    expected = huggingface_weights(shards)
    if form != "legacy":
        expected |= {f"exp_avg.{name}": 2 * value for name, value in expected.items()}
    assert read_manifest(tmp_path / "ours").tensors.keys() == expected.keys()
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    load(tmp_path / "ours", found)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_transformers_opens_what_becomes_of_it(
    tmp_path: Path, saved: tuple[Path, list[dict[str, Any]]]
) -> None:
    from transformers import AutoModelForCausalLM

    root, shards = saved
    converted(root / "legacy", tmp_path / "hf", "hf")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    assert model.config.num_key_value_heads == SIZES["kv_heads"]
    # What transformers keeps fused in memory, it takes apart again.
    model.save_pretrained(str(tmp_path / "again"))
    found = load_file(tmp_path / "again/model.safetensors")
    expected = huggingface_weights(shards)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("saved", ["untied"], indirect=True)
def test_shards_that_are_missing_or_disagree_are_named(
    tmp_path: Path, saved: tuple[Path, list[dict[str, Any]]]
) -> None:
    root, _ = saved

    def copy(form: str, name: str) -> Path:
        return Path(shutil.copytree(root / form, tmp_path / name))

    missing = copy("legacy", "missing")
    shutil.rmtree(missing / f"iter_{ITERATION:07d}/mp_rank_01_000")
    with pytest.raises(CheckpointError, match="lacks the folder of tensor-parallel rank 1"):
        converted(missing, tmp_path / "out", "holdfast")
    other = copy("legacy", "other")
    file = other / f"iter_{ITERATION:07d}/mp_rank_01_000/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["decoder.layers.0.input_layernorm.weight"][3] += 1
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"layers\.0\.input_layernorm.* differ in 1 of 16"):
        converted(other, tmp_path / "out", "holdfast")
    torch_dist = copy("dist", "torch_dist") / f"iter_{ITERATION:07d}"
    next(torch_dist.glob("__3_*.distcp")).unlink()
    with pytest.raises(CheckpointError, match=r"__3_\d\.distcp cannot be read"):
        converted(torch_dist, tmp_path / "out", "holdfast")
    zarr = copy("dist", "zarr") / f"iter_{ITERATION:07d}"
    (zarr / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="backend 'zarr'"):
        converted(zarr, tmp_path / "out", "holdfast")
    with pytest.raises(ConfigError, match=r"parts make 1 x \(25 \+ 25\) = 50"):
        converted(copy("dist", "sizes"), tmp_path / "out", "holdfast", values={"intermediate": 25})
    assert not (tmp_path / "out").exists()
