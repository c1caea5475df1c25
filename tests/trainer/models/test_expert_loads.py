"""The choices of each expert in a step are counted once, whatever layout counts them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import open_dataset
from holdfast.trainer.models import build_whole_model
from holdfast.trainer.reports.metrics import load_of
from support.oracles.transformers_models import DEEPSEEK, by_name, their_model, value_of
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, world_size_of

LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2, "data": 2},
    {"context": 2, "pipeline": 2, "schedule": "zb-h1"},
]


def run_of(layout: dict[str, Any], recompute: str = "none") -> RunConfig:
    return make_config(
        model={
            "family": "qwen3_moe",
            "layers": 2,
            "experts": 8,
            "experts_per_token": 3,
            "expert_intermediate": 16,
            "dropout": 0.0,
            "heads": 8,
        },
        train={
            "steps": 2,
            "seq_len": 32,
            "global_batch": 4,
            "context_chunks": 4,
            "recompute": recompute,
        },
        numerics={"tensor_shards": 2},
        parallel=layout,
    )


def counted(cluster: Cluster, config: RunConfig) -> list[Any]:
    ranks = cluster.run(
        "support.runs.expert_runs:train_counting",
        world_size_of(config),
        timeout_s=120.0,
        config=msgspec.to_builtins(config),
    )
    assert all(found == ranks[0] for found in ranks)
    return ranks[0]


@pytest.mark.mp
def test_biases_follow_the_loads_of_each_step(cluster: Cluster) -> None:
    """By a plain loop over the counted loads, though gradients are clipped."""
    model = {"heads": 4, "layers": 2, **DEEPSEEK, "router_bias_speed": 0.02}
    config = make_config(
        model=model,
        train={"steps": 5, "seq_len": 32, "global_batch": 4, "clip_grad_norm": 0.1},
    )
    job = "support.runs.expert_runs:train_balancing"
    [(loads, biases)] = cluster.run(job, 1, config=msgspec.to_builtins(config))
    expected = torch.zeros(8)
    for step in loads:
        of_experts = step[2]
        signs = [(8 * load < sum(of_experts)) - (8 * load > sum(of_experts)) for load in of_experts]
        expected += 0.02 * torch.tensor(signs)
    assert expected.abs().max() > 0.01
    assert biases == {
        "model.layers.1.mlp.gate.e_score_correction_bias": pytest.approx(expected.tolist())
    }


@pytest.mark.mp
@pytest.mark.slow
def test_layouts_count_what_transformers_routes(cluster: Cluster) -> None:
    """Also where layers are computed again, which counts nothing twice."""
    alone = counted(cluster, run_of({}))
    for place, layout in enumerate(LAYOUTS):
        assert counted(cluster, run_of(layout, ("full", "selective")[place])) == alone, layout
    assert counted(cluster, run_of({}, "full")) == alone
    assert alone[0][0] == alone[0][3] == (0,) * 8  # the embedding and the head
    assert all(sum(layer) == 4 * 32 * 3 for step in alone for layer in step[1:3])

    config = run_of({})
    model, train = config.model, config.train
    chunk = build_whole_model(
        model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seq_len=train.seq_len,
        micro_batch=1,
        seed=train.seed,
    )
    theirs = their_model(model, by_name(chunk, value_of), torch.float32)
    data = open_dataset(config.data, vocab=model.vocab, seq_len=train.seq_len, seed=train.seed)
    totals = torch.zeros(2, 8, dtype=torch.int64)
    for number in range(4):
        batch = data.batch(0, number, global_batch=4, micro_batch_size=1)
        routed = theirs(batch.tokens, output_router_logits=True).router_logits
        for layer, logits in enumerate(routed):
            chosen = logits.softmax(-1).topk(3).indices.flatten()
            totals[layer] += torch.bincount(chosen, minlength=8)
    assert totals.tolist() == [list(layer) for layer in alone[0][1:3]]


def test_a_load_says_how_even_choices_are() -> None:
    assert load_of([5, 5, 5, 5]) == (1.0, pytest.approx(1.0), 0)
    assert load_of([20, 0, 0, 0]) == (4.0, pytest.approx(0.0), 3)
    most, entropy, unused = load_of([6, 2, 0, 0])
    assert (most, unused) == (3.0, 2)
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64)
    plain = torch.distributions.Categorical(shares).entropy() / torch.tensor(4.0).log()
    assert entropy == pytest.approx(plain.item(), rel=1e-6)
