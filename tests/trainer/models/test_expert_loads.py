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

BALANCING = "support.runs.expert_runs:train_balancing"
HIDDEN = "support.runs.expert_runs:hidden_at_the_head"
ONE_EXPERT = "support.runs.expert_runs:train_one_expert"
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"
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
    model = {"heads": 4, "layers": 4, **DEEPSEEK, "dense_layers": [0, 1]}
    config = make_config(
        model=model | {"router_bias_speed": 0.02},
        train={"steps": 5, "seq_len": 32, "global_batch": 4, "clip_grad_norm": 0.1},
    )
    [(loads, biases)] = cluster.run(BALANCING, 1, config=msgspec.to_builtins(config))
    assert set(biases) == {BIAS.format(2), BIAS.format(3)}  # also behind layers that have none
    for layer in (2, 3):
        expected = torch.zeros(8)
        for step in loads:
            of_experts = step[1 + layer]
            mean = sum(of_experts) / 8
            expected += 0.02 * torch.tensor([(x < mean) - (x > mean) for x in of_experts])
        assert expected.abs().max() > 0.01
        assert biases[BIAS.format(layer)] == pytest.approx(expected.tolist())


@pytest.mark.mp
def test_a_bias_follows_loads_that_differ_by_one(cluster: Cluster) -> None:
    """In 16 bits both loads of a micro-batch are the same number, and so is what replicas share."""
    one_expert = {"experts": 2, "experts_per_token": 1, "expert_groups": 1, "groups_per_token": 1}
    sizes = {"layers": 1, "dense_layers": [], "heads": 1, "kv_heads": 1, "hidden": 8, "vocab": 16}
    rows = {"micro_batch": 27, "global_batch": 54}
    config = make_config(
        model={**DEEPSEEK, **one_expert, **sizes, "router_bias_speed": 0.5},
        train={"steps": 1, "seq_len": 19, "precision": "bf16", **rows},
        parallel={"data": 2, "shard": "gradients"},
    )
    arguments = {"config": msgspec.to_builtins(config), "in_turn": True}
    for loads, biases in cluster.run(BALANCING, 2, timeout_s=120.0, **arguments):
        assert loads[0][1] == (2 * 257, 2 * 256)
        assert biases == {BIAS.format(0): [-0.5, 0.5]}


@pytest.mark.mp
def test_a_sample_is_computed_as_if_alone(cluster: Cluster) -> None:
    """Neither the samples of other replicas nor how these load the experts change a bit of it."""
    found = []
    for replicas, others in ((1, 0), (2, 0), (2, 7)):
        config = make_config(
            model={"heads": 4, "layers": 2, **DEEPSEEK},
            train={"steps": 1, "global_batch": replicas},
            parallel={"tensor": 2, "data": replicas},
        )
        arguments = {"config": msgspec.to_builtins(config), "others": others}
        found.append(cluster.run(HIDDEN, world_size_of(config), **arguments))
    alone, *beside = found
    assert all(len(kept) == 1 for kept, _ in alone)
    for ranks in beside:
        assert [kept for kept, _ in ranks[:2]] == [kept for kept, _ in alone]
    assert beside[0][0][1] != beside[1][0][1]  # the loads of the step, which others change


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


@pytest.mark.mp
def test_an_expert_without_tokens_decays_and_its_state_advances(cluster: Cluster) -> None:
    """It has a gradient of zeros, as in a dense model, and none that is missing."""
    config = make_config(
        model={
            **{"family": "qwen3_moe", "layers": 1, "experts": 4, "experts_per_token": 1},
            "expert_intermediate": 8,
        },
        train={"steps": 3, "global_batch": 2},
        optimizer={"weight_decay": 0.5},
        parallel={"tensor": 2},
    )
    arguments: dict[str, Any] = {"config": msgspec.to_builtins(config)}
    ranks = cluster.run(ONE_EXPERT, 2, **arguments)
    for before, *steps in ranks:
        for place, (values, has_tokens) in enumerate(before):
            decayed = torch.tensor(values)
            for after in steps:
                decayed = decayed * (1 - 1e-2 * 0.5)
                found = torch.tensor(after[place][0])
                assert torch.allclose(found, decayed, rtol=1e-6, atol=0) != has_tokens
    assert [has for _, has in ranks[0][0]].count(True) == 3
    bug = cluster.run(ONE_EXPERT, 2, bug="experts_without_tokens_are_left_out", **arguments)
    assert bug[1][1] == bug[1][0]  # which would show: this rank's experts stay as they are


def test_a_load_says_how_even_choices_are() -> None:
    assert load_of([5, 5, 5, 5]) == (1.0, pytest.approx(1.0), 0)
    assert load_of([20, 0, 0, 0]) == (4.0, pytest.approx(0.0), 3)
    most, entropy, unused = load_of([6, 2, 0, 0])
    assert (most, unused) == (3.0, 2)
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64)
    plain = torch.distributions.Categorical(shares).entropy() / torch.tensor(4.0).log()
    assert entropy == pytest.approx(plain.item(), rel=1e-6)
