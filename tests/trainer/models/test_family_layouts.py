"""What sets families apart (biases, norms of heads, windows) has the same bits in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from holdfast.parallel.layout import Slices
from holdfast.parallel.pipeline import Documents
from holdfast.trainer.check.tiny import tiny_config
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.rules import problems_of
from support.oracles.transformers_models import (
    DEEPSEEK,
    by_name,
    context_of,
    gradient_of,
    our_model,
    small_model,
    tokens_of,
)
from support.processes.cluster import Cluster
from support.runs.small_runs import findings_of, make_config, run_training

MODELS: list[dict[str, Any]] = [
    {"family": "llama", "attention_bias": True, "mlp_bias": True},
    {"family": "qwen3", "attention_bias": True, "sliding_window": 5, "max_window_layers": 1},
    {
        "family": "qwen3_moe",
        "experts": 16,
        "experts_per_token": 3,
        "expert_intermediate": 24,
        "router_aux_loss_coef": 0.1,
        "router_z_loss_coef": 0.01,
    },
    {"family": "mixtral", "experts": 4, "experts_per_token": 1, "sliding_window": 6},
    {"family": "gpt2", "kv_heads": 0},
    DEEPSEEK
    | {
        "heads": 8,
        "kv_heads": 8,
        "router_bias_speed": 0.1,
        "router_aux_loss_coef": 0.1,
        "multi_token_layers": 1,
    },
]


@dataclass(frozen=True, slots=True)
class Group:
    """Runs with the same bits: no more slices and shards than the layouts need, as operators are
    repeated for each.
    """

    precision: str
    slices: int
    shards: int
    layouts: tuple[tuple[dict[str, Any], str], ...]
    """Each with what it recomputes."""


GROUPS = {
    "fp32 in slices": Group(
        "fp32",
        4,
        1,
        (
            ({"context": 2, "pipeline": 2, "stretches": 2}, "none"),
            ({"data": 2, "shard": "parameters"}, "selective"),
        ),
    ),
    "fp32 in shards": Group("fp32", 1, 2, (({"tensor": 2, "pipeline": 2}, "full"),)),
    "bf16": Group(
        "bf16",
        2,
        4,
        (
            ({"tensor": 4}, "full"),
            ({"context": 2, "context_exchange": "keys", "tensor": 2}, "none"),
            ({"pipeline": 2, "schedule": "zb-h1"}, "selective"),
        ),
    ),
}


def run_of(
    model: dict[str, Any], group: Group, layout: dict[str, Any], recompute: str
) -> RunConfig:
    is_bf16 = group.precision == "bf16"
    # Also matrices that are [in, out] are computed in strips.
    strips = 4 if is_bf16 and model["family"] == "gpt2" else 1
    config = make_config(
        model={"layers": 2, "heads": 8, "kv_heads": 2, **model},
        data={"packing": "documents"} if is_bf16 else {},
        train={
            # Loads of the first step change the biases of routers, and so the second one.
            "steps": 2 if "router_bias_speed" in model else 1,
            "seq_len": max(16, 8 * group.slices),
            "context_chunks": group.slices,
            "global_batch": 2,
            "z_loss_coef": 0.01,
            "precision": group.precision,
            "recompute": recompute,
        },
        numerics={"tensor_shards": group.shards, "tensor_strips": strips},
        parallel=layout,
    )
    assert problems_of(config, None) == []
    return config


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["family"])
def test_layouts_give_the_same_bits(cluster: Cluster, model: dict[str, Any], group: Group) -> None:
    config = run_of(model, group, {}, "none")
    alone = run_training(cluster, config)
    assert len(set(alone["losses"])) == config.train.steps
    for layout, recompute in group.layouts:
        found = run_training(cluster, run_of(model, group, layout, recompute))
        assert found == alone, layout


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["family"])
@pytest.mark.parametrize(
    "layout", [{"tensor": 2, "pipeline": 2}, {"tensor": 4, "sequence_parallel": False}], ids=str
)
def test_a_checked_layout_equals_autograd(
    cluster: Cluster, model: dict[str, Any], layout: dict[str, Any]
) -> None:
    if "experts" in model and not layout.get("sequence_parallel", True):
        layout = {"tensor": 4, "data": 2, "shard": "gradients"}
    config = make_config(
        model={"layers": 2, "kv_heads": 2, **model}, train={"global_batch": 2}, parallel=layout
    )
    assert findings_of(cluster, tiny_config(config, 2)) == []


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "keys", [{"family": "mistral", "sliding_window": 5}, {"family": "gpt2", "kv_heads": 0}], ids=str
)
def test_documents_are_as_if_alone_in_windows_and_with_learned_positions(
    keys: dict[str, Any], count: int
) -> None:
    """Each document's part of the loss and gradients is that of a sequence of its own."""
    model = small_model(**keys)
    lengths = [11, 13, 9, 15]
    tokens = tokens_of(model, 2, 25)
    packed, apart = (our_model(model, torch.float64) for _ in range(2))
    slices = Slices(24 // count, (0,) * count) if count > 1 else Slices()
    context = context_of(tokens, Documents.of(lengths, 2))
    losses = packed(None, context.__class__(0, 0, True, context.batch, slices=slices))
    losses.sum().backward()
    rows = [(0, 0, 11), (0, 11, 24), (1, 0, 9), (1, 9, 24)]
    total = 0.0
    for row, start, stop in rows:
        loss = apart(None, context_of(tokens[row : row + 1, start : stop + 1]))
        loss.backward()
        total += loss.item()
    assert losses.sum().item() == pytest.approx(total, rel=1e-12)
    theirs = by_name(apart, gradient_of)
    for name, gradient in by_name(packed, gradient_of).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-11)
