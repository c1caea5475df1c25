"""The parameter of a state of Megatron's optimizers is told by names, counts and shapes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from holdfast.checkpoint.convert.formats.megatron.optimizer_order import (
    Parameter,
    Unplaced,
    find_states,
    groups_of,
    order_of,
)
from holdfast.checkpoint.convert.rules.patterns import Pattern
from holdfast.checkpoint.convert.rules.rules import builtin_rules
from holdfast.checkpoint.convert.sources.pickles import StoredTensor
from holdfast.parallel.errors import CheckpointError

DENSE = [
    Parameter("embedding.word_embeddings.weight", "F32", (8, 4)),
    Parameter("decoder.layers.0.input_layernorm.weight", "F32", (4,)),
    Parameter("decoder.layers.0.self_attention.linear_qkv.weight", "F32", (12, 4)),
    Parameter("decoder.layers.0.self_attention.linear_qkv.bias", "F32", (12,)),
]
EXPERTS = [
    Parameter(f"decoder.layers.0.mlp.experts.local_experts.{n}.linear_fc1.weight", "F32", (6, 4))
    for n in range(2)
]


def tensor(name: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name, "F32", shape, (1,) * len(shape), 0)


def kept_of(*groups: tuple[dict[str, Any], list[Parameter]]) -> dict[str, Any]:
    """What torch's optimizer saves of groups; the storage of a state names its parameter."""
    states: dict[int, Any] = {}
    described = []
    for told, members in groups:
        first = len(states)
        for parameter in members:
            states[len(states)] = {
                kind: tensor(f"{kind} {parameter.key}", parameter.shape)
                for kind in ("exp_avg", "exp_avg_sq")
            }
        described.append({**told, "step": 3, "params": list(range(first, len(states)))})
    return {"state": states, "param_groups": described}


def assert_each_has_its_own(kept: Any, parameters: list[Parameter]) -> None:
    found = find_states(kept, parameters)
    assert len(found.tensors) == 2 * len(parameters)
    for kind, number, state in found.tensors:
        assert state.storage == f"{kind} {parameters[number].key}"
    assert set(found.steps) == {3}


def decay(multiple: float, **keys: Any) -> dict[str, Any]:
    return {"wd_mult": multiple, "lr_mult": 1.0, **keys}


def test_groups_of_any_order_and_empty_ones() -> None:
    flat, other = [DENSE[0], DENSE[2]], [DENSE[1], DENSE[3]]
    assert_each_has_its_own(kept_of((decay(1.0), flat), (decay(0.0), other)), DENSE)
    assert_each_has_its_own(kept_of((decay(0.0), other), (decay(1.0), flat)), DENSE)
    told = {"pre_wd_mult": 0.0}
    assert_each_has_its_own(kept_of((decay(1.0), []), (told, [DENSE[1]])), [DENSE[1]])


def test_experts_in_an_optimizer_of_their_own() -> None:
    dense = kept_of((decay(1.0), [DENSE[0], DENSE[2]]), (decay(0.0), [DENSE[1], DENSE[3]]))
    experts = kept_of((decay(1.0, is_expert_parallel=True), EXPERTS))
    assert_each_has_its_own([dense, experts], [*DENSE[:3], *EXPERTS, DENSE[3]])
    assert_each_has_its_own({"0": dense, "1": experts}, [*EXPERTS, *DENSE])
    assert [group["wd_mult"] for group in groups_of([dense, experts])] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("told", [{"is_decoupled_lr": True}, {"default_config": False}])
def test_a_learning_rate_for_the_embedding(told: dict[str, Any]) -> None:
    kept = kept_of(
        (decay(1.0), [DENSE[2]]), (decay(1.0, **told), [DENSE[0]]), (decay(0.0), DENSE[1::2])
    )
    assert_each_has_its_own(kept, DENSE)


@pytest.mark.parametrize(
    ("kept", "why"),
    [
        (kept_of((decay(1.0), DENSE)), "group 0 .* has 4 parameters, and the model has 2"),
        (kept_of((decay(1.0), DENSE[::2])), "no group has parameters like .*input_layernorm"),
        (
            kept_of((decay(1.0), DENSE[:1]), (decay(1.0, lr_mult=0.1), DENSE[2:3])),
            "group 0 .* has 1 parameters, and the model has 2",
        ),
        (
            kept_of((decay(1.0), DENSE[2::-2]), (decay(0.0), DENSE[1::2])),
            r"word_embeddings\.weight \[8, 4\] has shape \[12, 4\]",
        ),
        ({"state": {}, "param_groups": [decay(1.0, params=[0])]}, "no states of parameters"),
        ([], "no states of parameters"),
        ({"state": {}, "param_groups": [5]}, "group 0 is a int"),
        (
            {"state": {}, "param_groups": [decay(1.0)]},
            r"the params of group 0 are no list \(NoneType",
        ),
        (
            {**kept_of((decay(1.0), DENSE[:1])), "fp32_from_fp16_params": [[], []]},
            "1 groups and master copies of 2",
        ),
        ({"param_groups": [decay(1.0)]}, "by buckets, in distrib_optim"),
    ],
)
def test_what_does_not_come_out_is_said(kept: Any, why: str) -> None:
    with pytest.raises(Unplaced, match=why):
        find_states(kept, DENSE)


def test_every_parameter_that_is_written_has_a_place() -> None:
    names = {
        Pattern(rule.source).fill({"layer": str(layer), "expert": str(expert)})
        for rule in builtin_rules("megatron").rules
        if rule.is_written("te") or rule.is_written("local")
        for layer in (0, 2, 10)
        for expert in (0, 3, 11)
    }
    shuffled = random.Random(5).sample(sorted(names), len(names))
    placed = sorted(shuffled, key=order_of)
    assert len({order_of(name) for name in names}) == len(names)
    layers = [int(name.split(".")[2]) for name in placed if name.startswith("decoder.layers.")]
    assert layers == sorted(layers)
    assert placed[0] == "embedding.word_embeddings.weight"
    assert placed[-1] == "output_layer.weight"
    with pytest.raises(CheckpointError, match=r"cross_attention.* has no known place"):
        order_of("decoder.layers.0.cross_attention.linear_q.weight")
