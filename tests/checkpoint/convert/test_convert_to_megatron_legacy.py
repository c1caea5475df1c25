"""Folders of one file per rank for Megatron-Core: its model loads them.

They come back unchanged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.checkpoint import load, save
from holdfast.parallel.errors import CheckpointError, ConfigError
from support.foreign.conversions import converted
from support.foreign.megatron_jobs import SIZES
from support.foreign.megatron_shards import gpt2_weights, huggingface_weights
from support.processes.cluster import Cluster
from support.runs.tiny_models import EXPERTS, GPT2, make_model, weights_of

KINDS = [
    ("Llama", {"tie_word_embeddings": True}),
    ("Llama", {"head_dim": 6}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 8}),
    ("Mixtral", EXPERTS),
    ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2}),
    ("GPT2", GPT2),
]

OF_KIND = dict(KINDS)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True])
def test_megatrons_model_loads_every_ranks_file(
    megatron_pool: Cluster, tmp_path: Path, tie: bool
) -> None:
    make_model("Llama", tmp_path / "hf", tie_word_embeddings=tie)
    ranks = {"tensor": 2, "pipeline": 2}
    values = {**ranks, "vocab_multiple": 8, "transformer_engine": 0}
    converted(tmp_path / "hf", tmp_path / "megatron", "megatron-legacy", values=values)
    folder = str(tmp_path / "megatron/release")
    shards = megatron_pool.run(
        "support.foreign.megatron_jobs:load_legacy", 4, folder=folder, tie=tie, **ranks
    )
    expected = weights_of(tmp_path / "hf")
    found = huggingface_weights(shards)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert all(shard["args"]["padded_vocab_size"] == SIZES["padded_vocab"] for shard in shards)


@pytest.mark.parametrize(
    ("kind", "keys", "tensor", "pipeline", "own"),
    [
        *((kind, keys, 2, 2, 1) for kind, keys in KINDS),
        *((*KINDS[0], *layout) for layout in ((1, 1, 1), (2, 1, 0), (1, 4, 0))),
    ],
)
def test_a_model_comes_back(
    tmp_path: Path, kind: str, keys: dict[str, Any], tensor: int, pipeline: int, own: int
) -> None:
    make_model(kind, tmp_path / "hf", **keys)
    values = {"tensor": tensor, "pipeline": pipeline, "transformer_engine": own}
    converted(tmp_path / "hf", tmp_path / "megatron", "megatron-legacy", values=values)
    files = sorted((tmp_path / "megatron/release").glob("mp_rank_*/model_optim_rng.pt"))
    assert len(files) == tensor * pipeline
    with torch.serialization.safe_globals([argparse.Namespace]):
        first = torch.load(files[0], weights_only=True)
    theirs = "self_attention.linear_qkv.layer_norm_weight" if own else "input_layernorm.weight"
    assert f"decoder.layers.0.{theirs}" in first["model"]
    assert ("decoder.layers.0.self_attention.linear_qkv._extra_state" in first["model"]) == bool(
        own
    )
    assert first["args"].tensor_model_parallel_size == tensor
    (tmp_path / "megatron/release/config.json").unlink()
    back = converted(tmp_path / "megatron", tmp_path / "back", "hf")
    assert (back.source_format, (tmp_path / "back/config.json").exists()) == ("megatron", True)
    found, expected = weights_of(tmp_path / "back"), weights_of(tmp_path / "hf")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("kind", "dtype", "own", "virtual"),
    [("Qwen3", "", 1, 1), ("Llama", "BF16", 1, 2), ("Qwen2", "F16", 1, 1), ("GPT2", "BF16", 0, 2)],
)
def test_moments_and_master_copies_come_back(
    tmp_path: Path, kind: str, dtype: str, own: int, virtual: int
) -> None:
    model = make_model(kind, tmp_path / "hf", **OF_KIND[kind])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    save(tmp_path / "ours", {"model": model, "optimizer": optimizer}, step=3)
    values = {"tensor": 2, "pipeline": 2, "virtual": virtual, "transformer_engine": own}
    there = converted(
        tmp_path / "ours",
        tmp_path / "megatron",
        "megatron-legacy",
        model_files=tmp_path / "hf",
        dtype=dtype,
        values=values,
    )
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "3"
    back = converted(tmp_path / "megatron", tmp_path / "back", "holdfast")
    weights = there.tensors["weight"]
    masters = {"master": weights} if dtype else {}
    assert back.tensors == {"weight": weights, "exp_avg": weights, "exp_avg_sq": weights, **masters}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {
        f"{what}.{names[id(parameter)]}": state[what]
        for parameter, state in optimizer.state.items()
        for what in ("exp_avg", "exp_avg_sq")
    }
    for name, parameter in model.named_parameters():
        expected[f"master.{name}" if dtype else name] = parameter.detach()
    for name, value in expected.items():
        found = torch.zeros_like(value)
        load(tmp_path / "back", {name: found})
        assert torch.equal(found, value), name
    with torch.serialization.safe_globals([argparse.Namespace]):
        file = tmp_path / "megatron/iter_0000003/mp_rank_01_001/model_optim_rng.pt"
        content = torch.load(file, weights_only=True)
    assert ("model1" in content) == (virtual == 2)
    assert "iteration" in content
    assert "opt_param_scheduler" in content
    kept = content["optimizer"]["optimizer"] if dtype else content["optimizer"]
    # Transformer Engine's Adam takes no counts beside its tensors.
    assert all(("step" in state) == (own == 0) for state in kept["state"].values())
    assert [(g["wd_mult"], g["step"]) for g in kept["param_groups"]] == [(1.0, 3), (0.0, 3)]


def test_what_cannot_be_cut_is_named(tmp_path: Path) -> None:
    make_model("Llama", tmp_path / "hf", num_hidden_layers=3)

    def written(**values: int) -> None:
        converted(tmp_path / "hf", tmp_path / "out", "megatron-legacy", values=values)

    with pytest.raises(
        CheckpointError, match=r"linear_qkv\.weight \[32, 16\] cannot be cut into 4 .*2 groups"
    ):
        written(tensor=4)
    with pytest.raises(
        CheckpointError, match="3 layers, numbered up to 2, cannot be shared equally by 2"
    ):
        written(pipeline=2)
    with pytest.raises(ConfigError, match="tensor=0: give a number, 1 or more"):
        written(tensor=0)
    with pytest.raises(ConfigError, match="virtual=3 needs --value pipeline=2 or more"):
        written(virtual=3)
    with pytest.raises(
        CheckpointError, match=r"by 3 pipeline stages of 2 chunks; .* --value virtual"
    ):
        written(pipeline=3, virtual=2)
    with pytest.raises(ConfigError, match="transformer_engine is 1"):
        written(transformer_engine=2)
    assert not (tmp_path / "out").exists()
    weights = load_file(tmp_path / "hf/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError, match=r"without model\.layers\.1\.mlp\.up_proj"):
        written()


@pytest.mark.mp
@pytest.mark.slow
def test_megatrons_model_loads_gpt2(megatron_pool: Cluster, tmp_path: Path) -> None:
    make_model("GPT2", tmp_path / "hf", **GPT2)
    ranks = {"tensor": 2, "pipeline": 2}
    values = {**ranks, "vocab_multiple": 8, "transformer_engine": 0}
    converted(tmp_path / "hf", tmp_path / "legacy", "megatron-legacy", values=values)
    converted(tmp_path / "hf", tmp_path / "dist", "megatron", values={"vocab_multiple": 8})
    expected = weights_of(tmp_path / "hf")
    for job, folder in (("load_legacy", "legacy"), ("load", "dist")):
        shards = megatron_pool.run(
            f"support.foreign.megatron_jobs:{job}",
            4,
            folder=str(tmp_path / folder / "release"),
            tie=True,
            gpt2=True,
            **ranks,
        )
        found = gpt2_weights(shards)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
