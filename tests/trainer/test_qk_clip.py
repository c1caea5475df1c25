"""QK-clip lowers the logits of heads to the limit, with the same bits in every layout."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from torch import Tensor

from holdfast.parallel.layout import Box, HeadRows
from holdfast.parallel.optimizer.rules.clip import head_factors, row_factors
from holdfast.parallel.optimizer.rules.registry import rule_of
from holdfast.parallel.optimizer.rules.rule import BlockUpdate
from holdfast.trainer.check.tiny import tiny_config
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.rules import problems_of
from support.oracles.plain_llama import PlainLlama, rotate
from support.oracles.plain_training import (
    assert_equal_steps,
    run_here,
    train_here,
    twenty_steps,
)
from support.oracles.transformers_models import (
    DEEPSEEK,
    YARN,
    by_name,
    context_of,
    our_model,
    small_model,
    their_model,
    tokens_of,
    value_of,
)
from support.processes.cluster import Cluster
from support.runs.small_runs import findings_of, make_config, metrics_of, run_training

LIMIT = 2e-3


class PlainClip:
    """QK-clip of a plain model, in the place of one more optimizer of its loop."""

    def __init__(self, plain: PlainLlama, limit: float) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.largest: list[list[float]] = []
        """Of each step, the largest logit of each layer."""
        self._limit, self._layers = limit, [block.self_attn for block in plain.model.layers]
        self._noted: dict[Any, Tensor] = {}
        for attention in self._layers:
            attention.register_forward_pre_hook(self._note)

    @torch.no_grad()
    def _note(self, attention: Any, inputs: tuple[Tensor, ...]) -> None:
        shape, (x, *_) = attention.shape, inputs
        batch, seq, _ = x.shape
        query, key = (
            rotate(made.view(batch, seq, heads, -1).transpose(1, 2), shape.rope_theta)
            for made, heads in (
                (attention.q_proj(x), shape.heads),
                (attention.k_proj(x), shape.kv_heads),
            )
        )
        logits = query @ key.repeat_interleave(shape.heads // shape.kv_heads, 1).transpose(2, 3)
        seen = torch.ones(seq, seq, dtype=torch.bool).tril()
        logits = (logits / math.sqrt(query.shape[-1])).masked_fill(~seen, -torch.inf)
        largest = logits.amax((0, 2, 3))
        self._noted[attention] = torch.maximum(self._noted.get(attention, largest), largest)

    @torch.no_grad()
    def step(self) -> None:
        self.largest.append([self._noted[attention].max().item() for attention in self._layers])
        for attention in self._layers:
            shape, of_heads = attention.shape, self._noted.pop(attention).tolist()
            dim = shape.hidden // shape.heads
            for head, largest in enumerate(of_heads):
                rows = slice(head * dim, (head + 1) * dim)
                if largest > self._limit and shape.heads == shape.kv_heads:
                    for made in (attention.q_proj, attention.k_proj):
                        made.weight[rows] *= math.sqrt(self._limit / largest)
                elif largest > self._limit:
                    attention.q_proj.weight[rows] *= self._limit / largest


def of(optimizer: dict[str, Any], steps: int = 8, **sections: Any) -> RunConfig:
    config = twenty_steps(optimizer={"qk_clip": LIMIT, "lr": 2e-3, **optimizer}, **sections)
    return msgspec.structs.replace(config, train=msgspec.structs.replace(config.train, steps=steps))


def of_torch(plain: PlainLlama, name: str) -> list[torch.optim.Optimizer]:
    named = dict(plain.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "layers" in n and name == "muon"]
    norms = [p for p in named.values() if p.ndim == 1]
    taken = {id(p) for p in (*matrices, *norms)}
    rest = [p for p in named.values() if id(p) not in taken]
    groups = [{"params": rest}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), adamw]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_clipped_steps_are_those_of_a_plain_loop(tmp_path: Path, name: str, kv_heads: int) -> None:
    own = {"name": name} | ({"muon_precision": "full"} if name == "muon" else {})
    config = of(own, model={"heads": 4, "kv_heads": kv_heads})
    clips: list[PlainClip] = []

    def optimizers(plain: PlainLlama) -> Any:
        clips.append(PlainClip(plain, LIMIT))
        return [*of_torch(plain, name), clips[0]]

    with mock.patch.object(Tensor, "bfloat16", Tensor.clone):  # torch's Muon in full precision
        assert_equal_steps(config, optimizers)
    train_here(config, tmp_path)
    noted = [list(line["attention_logit"].values()) for line in metrics_of(tmp_path)]
    assert [value for step in noted for value in step] == pytest.approx(
        [value for step in clips[0].largest for value in step], rel=1e-7
    )
    assert run_here(config)["losses"] != run_here(of({**own, "qk_clip": 0.0}))["losses"]


MODELS: list[dict[str, Any]] = [
    {"family": "llama", "kv_heads": 4},
    {"family": "llama"},
    {"family": "qwen2", "kv_heads": 4},
    {"family": "gpt2", "kv_heads": 0},
    DEEPSEEK,
    DEEPSEEK | {"query_rank": 0, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
]


def noted_of(chunk: Any, context: Any, layer: int) -> list[float]:
    """The largest logit of each head of a layer."""
    logits: dict[Any, Tensor] = {}
    chunk(None, replace(context, logits=logits))
    [found] = [value for key, value in logits.items() if key.layer == layer]
    return found.tolist()


@contextmanager
def their_logits(kind: str) -> Iterator[list[Tensor]]:
    """The largest logit of each head in each layer that transformers computes meanwhile."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    plain, found = module.eager_attention_forward, list[Tensor]()

    def noting(of: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        scale = more.get("scaling") or query.shape[-1] ** -0.5
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query @ keys.transpose(2, 3) * scale
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        found.append(scores.masked_fill(~seen, -torch.inf).amax((0, 2, 3)))
        return plain(of, query, key, value, mask, **more)

    with mock.patch.object(module, "eager_attention_forward", noting):
        yield found


@pytest.mark.parametrize("keys", MODELS, ids=lambda keys: f"{keys['family']} {len(keys)}")
def test_logits_are_those_of_transformers_and_clipped_ones_are_the_limit(
    keys: dict[str, Any],
) -> None:
    model = small_model(**keys)
    chunk = our_model(model, torch.float64)
    tokens = tokens_of(model, 2, 17)
    context = context_of(tokens)
    with their_logits(keys["family"]) as theirs, torch.no_grad():
        their_model(model, by_name(chunk, value_of), torch.float64)(tokens[:, :-1])
    before = noted_of(chunk, context, 1)
    # Their rotary tables have float32.
    assert before == pytest.approx(theirs[0].tolist(), rel=2e-6)
    limit = sorted(before)[1] * 0.9  # all heads but one exceed it
    factors = head_factors([[], before], limit)
    for (*_, spec), parameter in chunk.rows():
        if spec.heads is not None and spec.heads.layer == 1:
            scales = row_factors(spec.heads, spec.box, factors[1])
            rows = torch.tensor(scales, dtype=torch.float64)
            part = parameter.data[spec.local_row : spec.local_row + spec.rows]
            part.movedim(spec.heads.dim, -1).mul_(rows)
    after = noted_of(chunk, context, 1)
    assert after == pytest.approx([min(value, limit) for value in before], rel=1e-9)
    assert after != pytest.approx(before, rel=1e-3)


def test_the_average_is_that_of_what_is_clipped() -> None:
    section = of({"name": "adamw", "ema": 0.9}).optimizer
    rule, settings = rule_of(section), rule_of(section).settings(section)
    master, heads = torch.ones(4, dtype=torch.float64), HeadRows(1, ((1, 0.5),))
    state = tuple(torch.zeros_like(master) for _ in rule.kinds)
    update = BlockUpdate(
        master,
        torch.zeros_like(master),
        state,
        decays=False,
        heads=(heads, Box((0, 0), (2, 2))),
        scale=torch.tensor([[0.5], [1.0]], dtype=torch.float64),
    )
    rule.update_blocks([update], torch.tensor(1.0), 0.1, settings)
    assert master.tolist() == state[-1].tolist() == [0.5, 0.5, 1.0, 1.0]


WIDE: dict[str, Any] = {"heads": 8, "kv_heads": 8, "layers": 2}
GROUPED = {"family": "qwen2", "heads": 8, "kv_heads": 2, "layers": 2, "dropout": 0.1}
GPT2 = {"family": "gpt2", "heads": 8, "kv_heads": 0, "layers": 2}
SLICES = {"seq_len": 32, "context_chunks": 4}
SHARDS = {"tensor_shards": 4}
Sections = dict[str, dict[str, Any]]
MUON = {"name": "muon", "lr": 2e-3, "qk_clip": 3e-3}
LAYOUTS: list[tuple[Sections, list[Sections]]] = [
    (
        {"model": GROUPED, "data": {"packing": "documents"}},
        [
            {"parallel": {"data": 2, "shard": "parameters"}, "train": {"recompute": "full"}},
            {"parallel": {"pipeline": 2, "data": 2, "schedule": "zb-h1"}},
        ],
    ),
    (
        {"model": WIDE, "train": SLICES},
        [
            {"parallel": {"context": 2}, "train": {"recompute": "selective"}},
            {"parallel": {"context": 4, "context_exchange": "keys"}},
            {"parallel": {"pipeline": 2, "stretches": 2}},
        ],
    ),
    (
        {"model": GROUPED, "train": {"precision": "bf16"}, "numerics": SHARDS},
        [
            {"parallel": {"tensor": 2, "data": 2}, "train": {"recompute": "full"}},
            {"parallel": {"tensor": 4, "sequence_parallel": True}},
            {"parallel": {"data": 2}, "optimizer": {"state": "host"}},
        ],
    ),
    (
        {"model": GPT2, "numerics": SHARDS},
        [{"parallel": {"tensor": 2, "data": 2, "shard": "gradients"}}],
    ),
    (
        {"model": DEEPSEEK | WIDE | {"multi_token_layers": 1}, "numerics": SHARDS},
        [
            {"parallel": {"tensor": 2, "pipeline": 2}, "train": {"recompute": "full"}},
            {"parallel": {"data": 4, "expert": 4}},
        ],
    ),
    (
        {"model": {"family": "mistral", **WIDE, "sliding_window": 6}},
        [{"parallel": {"data": 2}, "train": {"recompute": "full"}}],
    ),
]


def with_sections(*given: Sections) -> RunConfig:
    train = {"steps": 2, "global_batch": 4}
    merged: Sections = {"train": train, "optimizer": dict(MUON)}
    for sections in given:
        for name, keys in sections.items():
            merged[name] = {**merged.get(name, {}), **keys}
    config = make_config(**merged)
    assert problems_of(config) == []
    return config


@cache
def _alone(cluster: Cluster, encoded: bytes) -> dict[str, Any]:
    return run_training(cluster, make_config(**msgspec.json.decode(encoded)))


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "layout"), [(group, layout) for group, found in LAYOUTS for layout in found], ids=str
)
def test_clipped_steps_have_the_same_bits_in_any_layout(
    cluster: Cluster, group: Sections, layout: Sections
) -> None:
    def alone(**optimizer: Any) -> dict[str, Any]:
        config = msgspec.to_builtins(with_sections(group, {"optimizer": optimizer}))
        return _alone(cluster, msgspec.json.encode(config))

    own = {key: keys for key, keys in layout.get("optimizer", {}).items() if key != "state"}
    expected = alone(**own)
    assert run_training(cluster, with_sections(group, layout)) == expected
    assert expected["digest"] != alone(qk_clip=0.0)["digest"]


@pytest.mark.mp
def test_shadows_clip_as_owners_do(cluster: Cluster) -> None:
    config = with_sections({"model": GROUPED, "parallel": {"data": 2}})
    expected = _alone(
        cluster, msgspec.json.encode(msgspec.to_builtins(with_sections({"model": GROUPED})))
    )
    plain = msgspec.to_builtins(config)
    for memory in ("device", "host"):
        plain["elastic"]["shadow_memory"] = memory
        for found in cluster.run("support.runs.small_runs:train_with_shadows", 2, config=plain):
            assert found == (expected["losses"], expected["digest"], True, 0)


@pytest.mark.mp
@pytest.mark.parametrize("model", [GROUPED, DEEPSEEK | WIDE], ids=lambda model: model["family"])
def test_a_checked_layout_clips_as_the_reference_does(
    cluster: Cluster, model: dict[str, Any]
) -> None:
    config = with_sections(
        {"model": {**model, "dropout": 0.0}, "parallel": {"tensor": 2, "data": 2}}
        | {"numerics": {"tensor_shards": 2}}
    )
    assert findings_of(cluster, tiny_config(config, 3)) == []


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"family": "qwen3"}}, "norms the queries and keys of each head"),
        (
            {"parallel": {"context": 2, "context_exchange": "ring"}, "train": {"context_chunks": 2}}
            | {"numerics": {"reduction": "fast"}},
            "which tells no logits",
        ),
    ],
)
def test_what_cannot_be_clipped_is_refused(sections: Sections, said: str) -> None:
    [problem] = problems_of(make_config(**sections, optimizer={"qk_clip": 100.0}))
    assert problem.startswith("optimizer.qk_clip = 100.0")
    assert said in problem
