"""The average of the weights is torch's, with the same bits everywhere, and becomes a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from holdfast.checkpoint.stores.registry import read_manifest
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.optimizer.rules.registry import OPTIMIZERS, rule_of
from holdfast.parallel.optimizer.rules.rule import BlockUpdate
from holdfast.trainer.config import RunConfig, load_config
from support.foreign.conversions import converted, tensors_of
from support.oracles.plain_training import run_here, train_here, twenty_steps
from support.processes.cluster import Cluster
from support.runs.small_runs import metrics_of


def of(name: str = "adamw", steps: int = 6, stop_after: int = 0, **sections: Any) -> RunConfig:
    optimizer = {"name": name, "lr": 1e-2, "ema": 0.9, **sections.pop("optimizer", {})}
    config = twenty_steps(optimizer=optimizer, **sections)
    train = msgspec.structs.replace(config.train, steps=steps, stop_after=stop_after)
    return msgspec.structs.replace(config, train=train)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_average_is_that_of_torch(name: str) -> None:
    section = of(name).optimizer
    rule = rule_of(section)
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Linear(5, 4, bias=False).double()
    averaged = AveragedModel(weight, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    master = weight.weight.data.clone().view(-1)
    state = tuple(torch.zeros_like(master) for _ in rule.kinds)
    for step in range(1, 8):
        gradient = torch.randn(20, generator=generator, dtype=torch.float64)
        update = BlockUpdate(master, gradient, state, decays=True)
        rule.update_blocks([update], torch.tensor(float(step)), 0.1, rule.settings(section))
        weight.weight.data.copy_(master.view(4, 5))
        averaged.update_parameters(weight)
        expected = averaged.module.weight.data.view(-1)  # pyrefly: ignore
        torch.testing.assert_close(state[-1], expected, rtol=1e-12, atol=0)


@pytest.mark.mp
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_average_changes_no_step_and_has_the_same_bits_on_shadows(
    cluster: Cluster, name: str
) -> None:
    alone = run_here(of(name))
    assert alone == run_here(of(name, optimizer={"ema": 0.0}))
    plain = msgspec.to_builtins(of(name, parallel={"data": 2}))
    for found in cluster.run("support.runs.small_runs:train_with_shadows", 2, config=plain):
        assert found == (alone["losses"], alone["digest"], True, 0)


@pytest.mark.mp
def test_the_average_goes_on_from_a_checkpoint_and_becomes_a_model(
    cluster: Cluster, tmp_path: Path
) -> None:
    def config(stop_after: int = 0, **parallel: int) -> RunConfig:
        rounded = {"moments_dtype": "bf16"}
        return of(stop_after=stop_after, optimizer=rounded, parallel=dict(parallel))

    train_here(config(), tmp_path / "whole")
    plain = msgspec.to_builtins(config(3, data=2))
    root = str(tmp_path / "halves")
    cluster.run("support.runs.small_runs:train_in", 2, config=plain, root=root)
    train_here(config(), tmp_path / "halves")
    last = [tmp_path / run / "checkpoints/step-00000006" for run in ("whole", "halves")]
    whole, halves = map(tensors_of, last)
    averages = {name for name in whole if name.startswith("ema.")}
    assert len(averages) == sum("." in n and n.startswith(("model.", "lm_head")) for n in whole)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    entries = read_manifest(last[0]).tensors.values()
    assert {(e.kind, e.dtype) for e in entries if e.kind in ("ema", "exp_avg")} == {
        ("ema", "F64"),
        ("exp_avg", "BF16"),
    }
    done = converted(last[0], tmp_path / "averaged", "holdfast", weights="ema")
    assert done.tensors == {"weight": len(averages)}
    found = tensors_of(tmp_path / "averaged")
    assert all(torch.equal(found[name.removeprefix("ema.")], whole[name]) for name in averages)
    folder = converted(last[0], tmp_path / "hf", "hf", weights="ema", dtype="F32")
    assert (tmp_path / "hf/config.json").exists()
    assert folder.tensors == {"weight": len(averages)}
    with pytest.raises(CheckpointError, match=r"has no 'average' of model.* kinds of state are"):
        converted(last[0], tmp_path / "none", "hf", weights="average")


def test_an_average_does_not_begin_in_the_middle_of_a_run(tmp_path: Path) -> None:
    train_here(of(optimizer={"ema": 0.0}, steps=2), tmp_path / "without")
    source = str(tmp_path / "without/checkpoints/step-00000002")
    with pytest.raises(ConfigError, match=r"the checkpoint has no average.*optimizer\.ema"):
        train_here(of(steps=3), tmp_path / "with", resume=source)
    train_here(of(steps=3), tmp_path / "with", resume=source, allow_change=("optimizer.ema",))
    assert [line["step"] for line in metrics_of(tmp_path / "with")] == [1, 2, 3]
    # Another decay, or no average from now on, changes nothing that the checkpoint lacks.
    source = str(tmp_path / "with/checkpoints/step-00000003")
    for number, ema in enumerate((0.5, 0.0)):
        place = tmp_path / f"on {number}"
        train_here(of(steps=4, optimizer={"ema": ema}), place, resume=source)
        assert [line["step"] for line in metrics_of(place)] == [4]


def test_an_average_that_never_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\nfamily = "llama"\nlayers = 2\nhidden = 32\n')
    with pytest.raises(ConfigError, match="the average would never change"):
        load_config(path, ["optimizer.ema=1.0"])
