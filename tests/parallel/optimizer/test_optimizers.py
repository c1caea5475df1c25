"""Optimizers are those of torch.optim and of papers, and each keeps state of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from holdfast.checkpoint.stores.registry import read_manifest
from holdfast.parallel.comm import STATE_TRANSFER
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.optimizer.rules.registry import OPTIMIZERS
from holdfast.parallel.optimizer.rules.rule import BlockUpdate, StateFormat
from holdfast.parallel.optimizer.transfer_messages import BlockMessages, carried_bytes
from holdfast.parallel.plan import BlockTransfer
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig, load_config
from support.foreign.conversions import assert_equal, converted, tensors_of
from support.oracles.plain_llama import PlainLlama
from support.oracles.plain_training import (
    assert_equal_steps,
    run_here,
    train_here,
    twenty_steps,
)
from support.processes.cluster import Cluster
from support.runs.small_runs import metrics_of

ELEMENTWISE = ("lion", "sgd")


class PlainLion(torch.optim.Optimizer):
    """The algorithm of Chen et al. 2023, as its table 1 has it."""

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("m", torch.zeros_like(weight))
                gradient, (first, second) = weight.grad, group["betas"]
                update = first * momentum + (1 - first) * gradient
                decay = group["weight_decay"] * weight.data
                weight.data -= group["lr"] * (torch.sign(update) + decay)
                self.state[weight]["m"] = second * momentum + (1 - second) * gradient


def matrices_decay(plain: PlainLlama, decay: float) -> list[dict[str, Any]]:
    parameters = list(plain.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_torch(nesterov: bool) -> None:
    own = {"name": "sgd", "momentum": 0.8, "nesterov": nesterov, "lr": 0.05, "weight_decay": 0.01}
    assert_equal_steps(
        twenty_steps(optimizer=own),
        lambda plain: [
            torch.optim.SGD(matrices_decay(plain, 0.01), momentum=0.8, nesterov=nesterov)
        ],
    )


def test_lion_is_that_of_its_paper() -> None:
    own = {"name": "lion", "betas": [0.9, 0.99], "lr": 3e-4, "weight_decay": 0.5}
    # A sign that rounding decides moves a weight by twice the rate.
    assert_equal_steps(
        twenty_steps(optimizer=own),
        lambda plain: [PlainLion(matrices_decay(plain, 0.5), {"lr": 0.0, "betas": (0.9, 0.99)})],
        rel=1e-5,
    )


@given(st.sampled_from(ELEMENTWISE), st.integers(1, 300), st.integers(0, 300), st.integers(0, 9))
def test_updates_do_not_depend_on_the_cut_of_blocks(
    name: str, size: int, cut: int, seed: int
) -> None:
    rule = OPTIMIZERS[name]
    section = twenty_steps(optimizer={"name": name}).optimizer
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2 + len(rule.kinds), size, generator=generator)
    drawn[2:].abs_()

    def updated(*spans: slice) -> Tensor:
        values = drawn.clone()
        blocks = [
            BlockUpdate(values[0, s], values[1, s], tuple(v[s] for v in values[2:]), True)
            for s in spans
        ]
        rule.update_blocks(blocks, torch.tensor(3.0), 1e-3, rule.settings(section))
        return torch.cat([values[:1], values[2:]])

    cut = min(cut, size)
    assert torch.equal(updated(slice(0, size)), updated(slice(0, cut), slice(cut, size)))


def of(name: str, **sections: Any) -> RunConfig:
    own = {"name": name, "lr": 1e-3, **sections.pop("optimizer", {})}
    return twenty_steps(optimizer=own, **sections)


@pytest.mark.mp
@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_bits_are_equal_in_another_layout_and_on_shadows(cluster: Cluster, name: str) -> None:
    alone = run_here(steps(of(name), 6))
    plain = msgspec.to_builtins(steps(of(name, parallel={"data": 2}), 6))
    for found in cluster.run("support.runs.small_runs:train_with_shadows", 2, config=plain):
        assert found == (alone["losses"], alone["digest"], True, 0)


class RoundedAdamW(torch.optim.AdamW):
    """torch's, whose moments are rounded to bf16 after each step."""

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore[bad-override]
        super().step()
        for state in self.state.values():
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = state[kind].to(torch.bfloat16).to(state[kind].dtype)


def test_moments_in_bf16_are_rounded_after_each_step() -> None:
    # A moment near the middle of two values of bf16 is rounded as the last bits of fp64 say.
    assert_equal_steps(
        of("adamw", optimizer={"moments_dtype": "bf16"}),
        lambda plain: [RoundedAdamW(matrices_decay(plain, 0.1), betas=(0.9, 0.95), eps=1e-8)],
        rel=1e-4,
    )


@pytest.mark.mp
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_moments_in_bf16_are_saved_shadowed_and_equal_in_every_layout(
    cluster: Cluster, name: str, tmp_path: Path
) -> None:
    rounded: dict[str, Any] = {"optimizer": {"moments_dtype": "bf16"}}
    config = steps(of(name, **rounded), 6)
    alone = run_here(config)
    assert alone != run_here(steps(of(name), 6))
    plain = msgspec.to_builtins(steps(of(name, **rounded, parallel={"data": 2}), 6))
    for found in cluster.run("support.runs.small_runs:train_with_shadows", 2, config=plain):
        assert found == (alone["losses"], alone["digest"], True, 0)
    train_here(steps(config, 4), tmp_path / "whole")
    train_here(steps(config, 4, 2), tmp_path / "halves")
    train_here(steps(config, 4), tmp_path / "halves")
    whole, halves = (
        [line["loss_hex"] for line in metrics_of(tmp_path / run)] for run in ("whole", "halves")
    )
    assert whole == halves == alone["losses"][:4]
    source = tmp_path / "whole/checkpoints/step-00000004"
    dtypes = {(e.kind == "weight", e.dtype) for e in read_manifest(source).tensors.values()}
    assert dtypes == {(True, "F64"), (False, "BF16")}
    for form in ("dcp", "megatron", "megatron-legacy", "deepspeed-universal"):
        converted(source, tmp_path / form, form)
        converted(tmp_path / form, tmp_path / f"{form} back", "holdfast")
        found = tensors_of(tmp_path / f"{form} back")
        for key, value in tensors_of(source).items():  # some have all states in 32 bits
            assert torch.equal(found[key].to(value.dtype), value), (form, key)
    with pytest.raises(ConfigError, match=r"--allow-change optimizer\.moments_dtype"):
        train_here(steps(of(name), 4), tmp_path / "full", resume=str(source))


@pytest.mark.parametrize("sizes", [(3,), (4, 1, 7)])
def test_state_of_several_precisions_travels_in_one_message(sizes: tuple[int, ...]) -> None:
    form = StateFormat(OPTIMIZERS["lion"], PRECISIONS["fp32"], moments=PRECISIONS["bf16"])
    keys = tuple((0, number) for number in range(len(sizes)))
    states = {
        key: {kind: torch.randn(size).to(form.precision_of(kind).dtype) for kind in form.held}
        for key, size in zip(keys, sizes, strict=True)
    }
    ours = BlockTransfer(0, 0, keys, sizes)
    assert carried_bytes([ours], form) == sum(sizes) * 6
    sent: dict[int, Tensor] = {}
    comm = mock.Mock()
    comm.send = lambda values, peer, tag: sent.update({tag: values})
    messages = BlockMessages(comm, form, STATE_TRANSFER)
    messages.send(0, ours, states.__getitem__)
    checksum, content = sent.values()
    for key, found in messages.unpacked(ours, content, checksum):
        assert_equal(dict(found), states[key])


def steps(config: RunConfig, count: int, stop_after: int = 0) -> RunConfig:
    train = msgspec.structs.replace(config.train, steps=count, stop_after=stop_after)
    return msgspec.structs.replace(config, train=train)


@pytest.mark.parametrize(("name", "kind"), [("lion", "exp_avg"), ("sgd", "momentum_buffer")])
def test_state_is_saved_under_its_name_and_converted(tmp_path: Path, name: str, kind: str) -> None:
    config = of(name)
    train_here(steps(config, 4), tmp_path / "whole")
    train_here(steps(config, 4, 2), tmp_path / "halves")
    train_here(steps(config, 4), tmp_path / "halves")
    whole, halves = (
        [line["loss_hex"] for line in metrics_of(tmp_path / run)] for run in ("whole", "halves")
    )
    assert whole == halves
    source = tmp_path / "whole/checkpoints/step-00000004"
    assert {e.kind for e in read_manifest(source).tensors.values()} == {"weight", kind}
    there = converted(source, tmp_path / "dcp", "dcp")
    assert set(there.left_out) == {"param_groups"}, "torch's names of the settings are not known"
    converted(tmp_path / "dcp", tmp_path / "back", "holdfast")
    found = {n: v for n, v in tensors_of(tmp_path / "back").items() if not n.startswith("step.")}
    assert_equal(found, tensors_of(source))


def test_another_optimizer_starts_from_the_weights_alone(tmp_path: Path) -> None:
    train_here(steps(of("adamw"), 2), tmp_path / "adamw")
    source = str(tmp_path / "adamw/checkpoints/step-00000002")
    for name in ("lion", "sgd"):
        lion = steps(of(name), 3)
        with pytest.raises(ConfigError, match=r"--allow-change optimizer\.name"):
            train_here(lion, tmp_path / name, resume=source)
        train_here(lion, tmp_path / name, resume=source, allow_change=("optimizer.name",))
        assert [line["step"] for line in metrics_of(tmp_path / name)] == [1, 2, 3]
    first = {name: metrics_of(tmp_path / name)[0]["loss"] for name in ("adamw", "lion", "sgd")}
    assert first["lion"] == first["sgd"] < first["adamw"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["optimizer.momentum=0.5"], "it is a key of optimizer.name = 'sgd'"),
        (["optimizer.name=sgd", "optimizer.momentum=1"], "optimizer.momentum = 1.0: must be"),
        (
            ["optimizer.name=sgd", "optimizer.momentum=0", "optimizer.nesterov=true"],
            "optimizer.nesterov = true needs optimizer.momentum above 0",
        ),
        (
            ["optimizer.name=sgd", 'optimizer.groups=[{match = "*", betas = [0.9, 0.9]}]'],
            "optimizer.groups[0].betas: 'sgd' does not use it",
        ),
        (
            ["optimizer.moments_dtype=bf16", "optimizer.betas=[0.9, 0.999]"],
            "optimizer.betas = [0.9, 0.999] with optimizer.moments_dtype = 'bf16': a moment",
        ),
        (["optimizer.name=lyon"], "did you mean 'lion'?"),
    ],
)
def test_a_wrong_setting_says_what_to_change(tmp_path: Path, given: list[str], said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\nfamily = "llama"\nlayers = 2\nhidden = 32\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, given)
    assert said in str(caught.value)
