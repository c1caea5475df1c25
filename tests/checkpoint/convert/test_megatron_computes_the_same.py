"""Megatron-Core's own model computes what transformers does, from what is written for it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from holdfast.checkpoint import save
from holdfast.checkpoint.convert.formats.megatron.optimizer_order import order_of
from support.foreign.conversions import assert_equal, converted, tensors_of
from support.processes.cluster import Cluster
from support.runs.tiny_models import make_model, weights_of

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TOKENS = torch.randint(0, 45, (2, 24), generator=torch.Generator().manual_seed(3))
WIDER = {"head_dim": 16}
"""Heads wide enough to have frequencies on both sides of a scaling's limits."""


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("Llama", {}),
        ("Llama", {**WIDER, "rope_parameters": LLAMA3}),
        ("Mistral", {"sliding_window": 5}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {**WIDER, "rope_parameters": YARN}),
        (
            "Qwen3",
            {
                **WIDER,
                "rope_parameters": {
                    **YARN,
                    "beta_fast": 4.0,
                    "beta_slow": 0.5,
                    "mscale": 0.7,
                    "mscale_all_dim": 0.4,
                    "truncate": False,
                },
            },
        ),
    ],
)
def test_megatron_computes_what_transformers_does(
    megatron_pool: Cluster, tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(kind, tmp_path / "hf", **keys).eval()
    assert_computed(megatron_pool, model, tmp_path)
    # The other way its config.json is made from Megatron's arguments, and the model is the same.
    (tmp_path / "megatron/release/config.json").unlink()
    converted(tmp_path / "megatron", tmp_path / "back", "hf")
    assert_equal(weights_of(tmp_path / "back"), weights_of(tmp_path / "hf"))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "back")).eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def assert_computed(pool: Cluster, model: Any, folder: Path) -> dict[str, Tensor]:
    """Convert the model in folder/hf; Megatron's logits of tokens are the model's, and it saves it.

    Returns:
        Megatron's weights, by its names.
    """
    converted(folder / "hf", folder / "megatron", "megatron")
    # With its own config.json beside it, it is the same model too.
    converted(folder / "megatron", folder / "same", "hf")
    [(found, weights)] = pool.run(
        "support.foreign.megatron_forward:logits",
        1,
        folder=str(folder / "megatron/release"),
        tokens=TOKENS.tolist(),
        saved=str(folder / "theirs"),
    )
    # What Megatron saves of it is the model, too.
    converted(folder / "theirs", folder / "from theirs", "hf")
    assert_equal(weights_of(folder / "from theirs"), weights_of(folder / "hf"))
    with torch.no_grad():
        expected: Tensor = model(TOKENS).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01
    return weights


LATENT = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "num_nextn_predict_layers": 1,
}
SCALED = {**YARN, "original_max_position_embeddings": 4096, "mscale": 0.8, "mscale_all_dim": 0.6}


def deepseek(folder: Path, **keys: Any) -> Any:
    """A DeepSeek-V3 with a layer that predicts a further token, in a folder as it is published."""
    model = make_model("DeepseekV3", folder, **{**LATENT, **keys})
    weights = weights_of(folder)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.randn(8) / 8)
    weights[bias] = model.state_dict()[bias].clone()
    draw = torch.Generator().manual_seed(5)
    for name in [name for name in weights if name.startswith("model.layers.1.")]:
        further = name.replace(".1.", ".2.", 1)
        weights[further] = torch.randn(weights[name].shape, generator=draw)
    for name, shape in (
        ("eh_proj", (16, 32)),
        ("enorm", (16,)),
        ("hnorm", (16,)),
        ("shared_head.norm", (16,)),
    ):
        weights[f"model.layers.2.{name}.weight"] = torch.randn(shape, generator=draw)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model.eval()


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"q_lora_rank": None, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
        {"rope_parameters": SCALED},
    ],
)
def test_megatron_computes_what_deepseek_does(
    megatron_pool: Cluster, tmp_path: Path, keys: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = deepseek(tmp_path / "hf", **keys)
    held = assert_computed(megatron_pool, model, tmp_path)
    expected = weights_of(tmp_path / "hf")
    assert_further_layer(held, expected)
    # In folders of a file a rank, Megatron's own layers have these names, in this order.
    values = {"transformer_engine": 0}
    converted(tmp_path / "hf", tmp_path / "legacy", "megatron-legacy", values=values)
    file = tmp_path / "legacy/release/mp_rank_00/model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert_equal(torch.load(file, weights_only=True)["model"], held)
    order = sorted((name for name in held if "expert_bias" not in name), key=order_of)
    assert order == [name for name in held if "expert_bias" not in name]
    (tmp_path / "megatron/release/config.json").unlink()
    converted(tmp_path / "megatron", tmp_path / "back", "hf")
    assert_equal(weights_of(tmp_path / "back"), expected)
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "back")).eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def assert_further_layer(held: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """What Megatron has loaded into the layer that predicts a further token."""
    theirs, ours, own = "mtp.layers.0.", "model.layers.2.", "transformer_layer."
    pairs = {
        "enorm": "enorm",
        "hnorm": "hnorm",
        "eh_proj": "eh_proj",
        "final_layernorm": "shared_head.norm",
        f"{own}self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
        f"{own}self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
        f"{own}mlp.router": "mlp.gate",
        f"{own}mlp.experts.local_experts.3.linear_fc2": "mlp.experts.3.down_proj",
    }
    for name, name_here in pairs.items():
        found = held[f"{theirs}{name}.weight"]
        assert torch.equal(found, expected[f"{ours}{name_here}.weight"]), name
    bias = expected[f"{ours}mlp.gate.e_score_correction_bias"]
    assert torch.equal(held[f"{theirs}{own}mlp.router.expert_bias"], bias)
    gate, up = held[f"{theirs}{own}mlp.shared_experts.linear_fc1.weight"].chunk(2)
    assert torch.equal(gate, expected[f"{ours}mlp.shared_experts.gate_proj.weight"])
    assert torch.equal(up, expected[f"{ours}mlp.shared_experts.up_proj.weight"])


@pytest.mark.parametrize(
    ("to", "values"),
    [
        ("megatron", {}),
        ("megatron-legacy", {"tensor": 2, "pipeline": 2}),
        ("megatron-legacy", {"tensor": 2, "transformer_engine": 0}),
    ],
)
def test_moments_of_a_deepseek_come_back(tmp_path: Path, to: str, values: dict[str, int]) -> None:
    """Of all but the routers' biases, of which no optimizer has any."""
    deepseek(tmp_path / "hf")
    model = module_of(weights_of(tmp_path / "hf"))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    save(tmp_path / "ours", {"model": model, "optimizer": optimizer}, step=1)
    files = {"model_files": tmp_path / "hf"}
    converted(tmp_path / "ours", tmp_path / "there", to, values=values, **files)
    converted(tmp_path / "there", tmp_path / "back", "holdfast")
    found, expected = tensors_of(tmp_path / "back"), tensors_of(tmp_path / "ours")
    assert found.keys() >= {name for name in expected if name.startswith("exp_avg")}
    for name, value in expected.items():
        if name in found:
            assert torch.equal(found[name], value), name
    assert set(model.state_dict()) <= found.keys()


def module_of(weights: dict[str, Tensor]) -> torch.nn.Module:
    """A module of parameters with these names, and buffers for the routers' biases."""
    root = torch.nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        inner = root
        for part in path:
            if part not in dict(inner.named_children()):
                inner.add_module(part, torch.nn.Module())
            inner = inner.get_submodule(part)
        if last == "e_score_correction_bias":
            inner.register_buffer(last, value)
        else:
            inner.register_parameter(last, torch.nn.Parameter(value))
    return root
