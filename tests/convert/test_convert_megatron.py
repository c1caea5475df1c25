"""What Megatron-Core saves for 2 x 2 ranks, in both of its forms, against its shards put together by torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster import Cluster
from holdfast.checkpoint import load
from holdfast.checkpoint.convert.job import Converted, convert
from holdfast.checkpoint.convert.request import Conversion
from holdfast.checkpoint.directory import read_manifest
from holdfast.checkpoint.verify import verify_checkpoint
from holdfast.parallel.errors import CheckpointError, ConfigError
from megatron_jobs import ITERATION, SIZES

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.mp, pytest.mark.slow]

LAYERS_A_STAGE = SIZES["layers"] // 2


def converted(source: Path, target: Path, to: str, **keys: Any) -> Converted:
    found = convert(Conversion(source, target, to, **keys))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    root = tmp_path_factory.mktemp("megatron")
    pool = Cluster(4)
    try:
        return root, pool.run("megatron_jobs:save", 4, tensor=2, pipeline=2, root=str(root))
    finally:
        pool.close()


@pytest.fixture(params=["untied", "tied"])
def saved(
    request: pytest.FixtureRequest, saved_models: tuple[Path, list[Any]]
) -> tuple[Path, list[dict[str, Any]]]:
    root, shards = saved_models
    number = ["untied", "tied"].index(request.param)
    return root / request.param, [shard[number] for shard in shards]


def huggingface_weights(shards: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Every weight under its Hugging Face name, from the ranks' own, as Megatron's code defines them."""
    place = {(shard["tp"], shard["pp"]): shard["weights"] for shard in shards}
    heads, kv_heads = SIZES["heads"], SIZES["kv_heads"]
    dim = SIZES["hidden"] // heads

    def rows(name: str, stage: int, axis: int = 0) -> Tensor:
        return torch.cat([place[index, stage][name] for index in range(2)], dim=axis)

    found = {
        "model.embed_tokens.weight": rows("embedding.word_embeddings.weight", 0)[: SIZES["vocab"]],
        "model.norm.weight": place[0, 1]["decoder.final_layernorm.weight"],
    }
    if "output_layer.weight" in place[0, 1]:
        tied = torch.equal(
            rows("output_layer.weight", 1), rows("embedding.word_embeddings.weight", 0)
        )
        if not tied:
            found["lm_head.weight"] = rows("output_layer.weight", 1)[: SIZES["vocab"]]
    for stage in range(2):
        for local in range(LAYERS_A_STAGE):
            theirs = f"decoder.layers.{local}."
            ours = f"model.layers.{stage * LAYERS_A_STAGE + local}."
            qkv = rows(f"{theirs}self_attention.linear_qkv.weight", stage)
            grouped = qkv.view(kv_heads, heads // kv_heads + 2, dim, SIZES["hidden"])
            query, key, value = grouped.split([heads // kv_heads, 1, 1], dim=1)
            for name, part in (("q", query), ("k", key), ("v", value)):
                found[f"{ours}self_attn.{name}_proj.weight"] = part.reshape(-1, SIZES["hidden"])
            found[f"{ours}self_attn.o_proj.weight"] = rows(
                f"{theirs}self_attention.linear_proj.weight", stage, 1
            )
            pairs = [place[i, stage][f"{theirs}mlp.linear_fc1.weight"].chunk(2) for i in range(2)]
            found[f"{ours}mlp.gate_proj.weight"] = torch.cat([gate for gate, _ in pairs])
            found[f"{ours}mlp.up_proj.weight"] = torch.cat([up for _, up in pairs])
            found[f"{ours}mlp.down_proj.weight"] = rows(f"{theirs}mlp.linear_fc2.weight", stage, 1)
            for norm, name in (
                ("input_layernorm", "input_layernorm"),
                ("pre_mlp_layernorm", "post_attention_layernorm"),
            ):
                found[f"{ours}{name}.weight"] = place[0, stage][f"{theirs}{norm}.weight"]
    return found


@pytest.mark.parametrize("form", ["dist", "legacy"])
def test_every_weight_is_what_megatrons_shards_make_up(
    tmp_path: Path, saved: tuple[Path, list[dict[str, Any]]], form: str
) -> None:
    root, shards = saved
    done = converted(root / form, tmp_path / "ours", "holdfast")
    assert (done.source_format, done.step) == ("megatron", ITERATION)
    assert verify_checkpoint(tmp_path / "ours") == []
    expected = huggingface_weights(shards)
    if form == "dist":
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
    expected = huggingface_weights(shards)
    assert model.config.num_key_value_heads == SIZES["kv_heads"]
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name


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
