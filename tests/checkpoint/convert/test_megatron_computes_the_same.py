"""Megatron-Core's own model computes what transformers does, from what is written for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.foreign.conversions import assert_equal, converted
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


def assert_computed(pool: Cluster, model: Any, folder: Path) -> None:
    """Convert the model in folder/hf; Megatron's logits of tokens are the model's."""
    converted(folder / "hf", folder / "megatron", "megatron")
    # With its own config.json beside it, it is the same model too.
    converted(folder / "megatron", folder / "same", "hf")
    [found] = pool.run(
        "support.foreign.megatron_forward:logits",
        1,
        folder=str(folder / "megatron/release"),
        tokens=TOKENS.tolist(),
    )
    with torch.no_grad():
        expected: Tensor = model(TOKENS).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01
