"""What is written for Megatron-Core is loaded by it on 2 x 2 ranks, and comes back unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from holdfast.checkpoint import save
from holdfast.parallel.errors import CheckpointError, ConfigError
from support.foreign.conversions import assert_equal, converted
from support.foreign.megatron_jobs import SIZES
from support.foreign.megatron_shards import huggingface_weights
from support.processes.cluster import Cluster
from support.runs.tiny_models import EXPERTS, GPT2, make_model, weights_of

PADDED = {"vocab_multiple": 16}


@pytest.mark.mp
@pytest.mark.slow
def test_megatron_goes_on_with_its_distributed_optimizer(
    megatron_pool: Cluster, tmp_path: Path
) -> None:
    model = make_model("Llama", tmp_path / "hf")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    save(tmp_path / "ours", {"model": model, "optimizer": optimizer}, step=3)
    done = converted(
        tmp_path / "ours",
        tmp_path / "megatron",
        "megatron",
        model_files=tmp_path / "hf",
        values=PADDED,
    )
    assert done.step == 3
    shards = megatron_pool.run(
        "support.foreign.megatron_jobs:load",
        4,
        tensor=2,
        pipeline=2,
        folder=str(tmp_path / "megatron/iter_0000003"),
        optimizer=True,
    )
    weights = dict(model.state_dict())
    assert_equal(huggingface_weights(shards), weights)
    assert_equal(huggingface_weights(shards, "param"), weights)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = {names[id(p)]: kept[kind] for p, kept in optimizer.state.items()}
        assert_equal(huggingface_weights(shards, kind), moments)
    assert all((shard["step"], shard["iteration"]) == (3, 3) for shard in shards)


@pytest.mark.mp
@pytest.mark.slow
def test_megatron_loads_experts_over_expert_parallel_ranks(
    megatron_pool: Cluster, tmp_path: Path
) -> None:
    make_model("Mixtral", tmp_path / "hf", **EXPERTS)
    converted(tmp_path / "hf", tmp_path / "megatron", "megatron", values=PADDED)
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "release"
    shards = megatron_pool.run(
        "support.foreign.megatron_jobs:load",
        4,
        tensor=2,
        pipeline=2,
        expert=2,
        experts=SIZES["experts"],
        folder=str(tmp_path / "megatron/release"),
    )
    assert_equal(huggingface_weights(shards, expert=2), weights_of(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"head_dim": 6, "rope_theta": 5e5}),
        ("Qwen2", {"num_key_value_heads": 4}),
        ("Mistral", {"sliding_window": 5}),
        ("Qwen3", {"head_dim": 8}),
        ("Mixtral", EXPERTS),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2}),
        ("GPT2", GPT2),
        ("GPT2", {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False}),
    ],
)
def test_a_model_comes_back_with_its_configuration(
    tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(kind, tmp_path / "hf", **keys)
    converted(tmp_path / "hf", tmp_path / "megatron", "megatron")
    # The other way it is made from Megatron's arguments.
    (tmp_path / "megatron/release/config.json").unlink()
    converted(tmp_path / "megatron", tmp_path / "back", "hf")
    assert_equal(weights_of(tmp_path / "back"), weights_of(tmp_path / "hf"))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "back"))
    tokens = torch.arange(12).view(2, 6)
    assert type(again) is type(model)
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


def test_types_and_moments_come_back(tmp_path: Path) -> None:
    model = make_model("Qwen2", tmp_path / "hf").to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for kept in optimizer.state.values():
        kept["exp_avg"] = kept["exp_avg"].float()
        kept["exp_avg_sq"] = kept["exp_avg_sq"].float()
    save(tmp_path / "ours", {"model": model, "optimizer": optimizer}, step=1)
    files = {"model_files": tmp_path / "hf"}
    there = converted(tmp_path / "ours", tmp_path / "megatron", "megatron", **files)
    back = converted(tmp_path / "megatron", tmp_path / "back", "holdfast")
    weights = len(dict(model.named_parameters()))
    for done in (there, back):
        assert {kind: done.tensors[kind] for kind in ("weight", "exp_avg", "master")} == {
            "weight": weights,
            "exp_avg": weights,
            "master": weights,
        }
    converted(tmp_path / "back", tmp_path / "second", "megatron")
    converted(tmp_path / "back", tmp_path / "weights", "hf")
    found = weights_of(tmp_path / "weights")
    expected = {n: value for n, value in model.state_dict().items() if n in found}
    assert_equal(found, expected)
    names = ("__0_0.distcp", ".metadata")
    for name in names:
        first = (tmp_path / "megatron/iter_0000001" / name).read_bytes()
        assert (tmp_path / "second/iter_0000001" / name).read_bytes() == first


GIVEN = {"heads": 4, "kv_heads": 2, "head_dim": 4, "intermediate": SIZES["ffn"]}
"""The sizes of a source without config.json."""


def test_what_megatron_does_not_have_is_named(tmp_path: Path) -> None:
    make_model("Llama", tmp_path / "hf")
    weights = weights_of(tmp_path / "hf")
    out = tmp_path / "out"

    def variant(name: str, changed: dict[str, Tensor], config: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file({n: v.contiguous() for n, v in changed.items()}, folder / "model.safetensors")
        if config:
            (folder / "config.json").write_text((tmp_path / "hf/config.json").read_text())
        return folder

    odd = variant("odd", {**weights, "model.layers.0.conv.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"no rule of megatron gives model\.layers\.0\.conv"):
        converted(odd, out, "megatron")
    short = {n: v for n, v in weights.items() if n != "model.layers.2.self_attn.k_proj.weight"}
    with pytest.raises(CheckpointError, match=r"without model\.layers\.2\.self_attn\.k_proj"):
        converted(variant("short", short), out, "megatron")
    with pytest.raises(CheckpointError, match=r"made of model\.layers\.2\.self_attn\.k_proj"):
        converted(variant("untold", short, config=False), out, "megatron", values=GIVEN)
    gap = {n: v for n, v in weights.items() if ".layers.1." not in n}
    with pytest.raises(CheckpointError, match=r"without model\.layers\.1\."):
        converted(variant("gap", gap), out, "megatron")
    with pytest.raises(CheckpointError, match="layer 1 has none"):
        converted(variant("untold gap", gap, config=False), out, "megatron", values=GIVEN)
    mixed = {**weights, "model.layers.3.mlp.up_proj.weight": torch.zeros(30, SIZES["hidden"])}
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight has 30"):
        converted(variant("mixed", mixed), out, "megatron")
    rounded = dict(weights)
    rounded["model.layers.3.mlp.up_proj.weight"] = weights[
        "model.layers.3.mlp.up_proj.weight"
    ].half()
    with pytest.raises(CheckpointError, match="must have one type"):
        converted(variant("rounded", rounded), out, "megatron")
    bare = variant("bare", weights, config=False)
    with pytest.raises(ConfigError, match="needs the value"):
        converted(bare, out, "megatron")
    converted(bare, out, "megatron", values=GIVEN)
    converted(out, tmp_path / "again", "hf")
    assert_equal(weights_of(tmp_path / "again"), weights)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        ("rope_parameters", {**YARN, "attention_factor": 1.2}),
        ("rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_theta", 10000.5),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("model_type", "granite"),
        ("logits_scaling", 8.0),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_a_setting_without_an_argument_is_refused_by_its_name(
    tmp_path: Path, key: str, value: Any
) -> None:
    make_model("Llama", tmp_path / "hf")
    described = json.loads((tmp_path / "hf/config.json").read_text())
    if key in ("rope_scaling", "rope_theta"):
        del described["rope_parameters"]
    (tmp_path / "hf/config.json").write_text(json.dumps({**described, key: value}))
    named = {"rope_parameters": "rope_type|llama3|partial|attention_factor"}
    name = {**named, "rope_scaling": "rope_type"}.get(key)
    with pytest.raises(CheckpointError, match=f"no words for this.*({name or key})"):
        converted(tmp_path / "hf", tmp_path / "megatron", "megatron")


@pytest.mark.parametrize("window", [(4, 0), None])
def test_a_window_that_contradicts_the_arguments_is_named(
    tmp_path: Path, window: tuple[int, int] | None
) -> None:
    """A config.json beside what Megatron saved says 8 keys, and the arguments 5, or all."""
    make_model("Mistral", tmp_path / "hf", sliding_window=window and window[0] + 1)
    converted(tmp_path / "hf", tmp_path / "megatron", "megatron")
    told = tmp_path / "megatron/release/config.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "sliding_window": 8}))
    with pytest.raises(CheckpointError, match="sliding_window is 8, and"):
        converted(tmp_path / "megatron", tmp_path / "back", "hf")
