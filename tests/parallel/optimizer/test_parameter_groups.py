"""Groups of parameters are those of torch.optim, in every layout and with shadows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import RunConfig, dump_toml, load_config
from holdfast.trainer.run.resume import differing_keys
from support.foreign.conversions import converted
from support.oracles.plain_llama import PlainLlama
from support.oracles.plain_training import (
    assert_equal_steps,
    run_here,
    train_here,
    twenty_steps,
)
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, metrics_of

GROUPS: list[dict[str, Any]] = [
    {"match": ["model.embed_tokens.*", "lm_head.weight"], "lr": 6e-3, "weight_decay": 0.0},
    {"match": "*norm.weight", "weight_decay": 0.3, "betas": [0.8, 0.9]},
    {"match": "model.layers.1.*", "eps": 1e-4, "lr": 1e-3},
    {"match": "model.layers.*.mlp.*", "betas": [0.95, 0.99]},
]
TABLE = '[model]\nfamily = "llama"\nlayers = 2\nhidden = 32\n'


def grouped(**sections: dict[str, Any]) -> RunConfig:
    return twenty_steps(optimizer={"groups": GROUPS}, **sections)


def test_groups_are_those_of_torch() -> None:
    def adamw(plain: PlainLlama) -> list[torch.optim.Optimizer]:
        named = dict(plain.named_parameters())
        edges = [p for name, p in named.items() if "embed" in name or "lm_head" in name]
        norms = [p for p in named.values() if p.ndim == 1]
        second = [p for name, p in named.items() if ".1." in name and p.ndim > 1]
        mlp = [p for name, p in named.items() if ".0.mlp" in name]
        rest = [p for name, p in named.items() if ".0.self_attn" in name]
        assert sum(map(len, (edges, norms, second, mlp, rest))) == len(named)
        made = [
            {"params": edges, "factor": 2.0, "weight_decay": 0.0},
            {"params": norms, "weight_decay": 0.3, "betas": (0.8, 0.9)},
            {"params": second, "eps": 1e-4, "factor": 1 / 3},
            {"params": mlp, "betas": (0.95, 0.99)},
            {"params": rest},
        ]
        return [torch.optim.AdamW(made, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)]

    assert_equal_steps(grouped(), adamw)


def test_groups_that_say_what_all_have_change_no_bit() -> None:
    plain = twenty_steps()
    told = twenty_steps(optimizer={"groups": [{"match": "*proj*", "weight_decay": 0.1}]})
    assert run_here(plain) == run_here(told) != run_here(grouped())


@pytest.mark.mp
def test_groups_have_the_same_bits_in_another_layout_and_on_shadows(cluster: Cluster) -> None:
    alone = run_here(grouped())
    plain = msgspec.to_builtins(grouped(parallel={"data": 2}))
    job = "support.runs.small_runs:train_with_shadows"
    for found in cluster.run(job, 2, config=plain):
        assert found == (alone["losses"], alone["digest"], True, 0)


def test_groups_go_on_from_a_checkpoint_and_no_other_format_has_them(tmp_path: Path) -> None:
    config = grouped()
    short = msgspec.structs.replace(config.train, steps=4)
    whole = msgspec.structs.replace(config, train=short)
    half = msgspec.structs.replace(config, train=msgspec.structs.replace(short, stop_after=2))
    train_here(whole, tmp_path / "whole")
    train_here(half, tmp_path / "halves")
    train_here(whole, tmp_path / "halves")
    losses = [
        [line["loss_hex"] for line in metrics_of(tmp_path / name)] for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1]
    source = tmp_path / "whole/checkpoints/step-00000004"
    for form in ("dcp", "megatron", "megatron-legacy", "deepspeed-universal"):
        there = converted(source, tmp_path / form, form)
        assert "optimizer.groups" in there.left_out, form


def test_groups_are_written_and_read_back(tmp_path: Path) -> None:
    config = make_config(model={"layers": 2}, optimizer={"groups": GROUPS})
    path = tmp_path / "c.toml"
    path.write_text(dump_toml(config))
    assert load_config(path) == config
    given = load_config(path, ['optimizer.groups=[{match = "*norm*", lr = 1e-4}]'])
    [group] = given.optimizer.groups
    assert (group.patterns, group.lr, group.constants) == (("*norm*",), 1e-4, {})
    before, now = (msgspec.to_builtins(c) for c in (config, given))
    assert [key for key, *_ in differing_keys(before, now, ("optimizer.",))] == ["optimizer.groups"]
    del before["optimizer"]["groups"]
    assert differing_keys(before, msgspec.to_builtins(make_config()), ("optimizer.groups",)) == []


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            '{match = "model.norm"}',
            "no parameter has such a name; did you mean 'model.norm.weight'?",
        ),
        ('{match = "*.mlp.down.*"}', "did you mean 'model.layers.0.mlp.down_proj.weight'?"),
        ('{match = ["*", "x"]}', "optimizer.groups[0].match = 'x': no parameter"),
        ("{match = []}", "optimizer.groups[0].match = []: name parameters"),
        (
            '{match = "*"}, {match = "*norm*"}',
            "optimizer.groups[1].match = '*norm*': groups before it",
        ),
        ('{match = "*", weight_deca = 1}', "did you mean optimizer.groups[0].weight_decay?"),
        ("{lr = 1}", "match"),
        ('{match = "*", lr = -1}', "optimizer.groups[0].lr = -1.0: must be greater than 0"),
        (
            '{match = "*", betas = [0.9, 1]}',
            "optimizer.groups[0].betas[1] = 1.0: must be at least 0",
        ),
        ("{match = 3}", "optimizer.groups"),
    ],
)
def test_a_wrong_group_says_what_to_change(tmp_path: Path, groups: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(TABLE)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"optimizer.groups=[{groups}]"])
    assert said in str(caught.value)
