"""A model family is one folder and one line of the registry: everything else finds it there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.check.reference import run_reference
from holdfast.trainer.check.tiny import tiny_config
from holdfast.trainer.config.loading import convert_config, dump_toml, load_config
from holdfast.trainer.models import FAMILIES
from holdfast.trainer.plan_report.report import plan_report
from support.processes.cluster import Cluster
from support.runs import token_mlp
from support.runs.small_runs import metrics_of, world_size_of

TABLE: dict[str, dict[str, Any]] = {
    "model": {"family": "token-mlp", "layers": 2, "hidden": 16, "vocab": 19, "expansion": 3},
    "train": {"steps": 6, "seq_len": 8, "global_batch": 8, "micro_batch": 2, "device": "cpu"},
    "optimizer": {"lr": 1e-2, "warmup_steps": 1, "block_elements": 64},
    "checkpoint": {"every": 3},
    "log": {"tensorboard": False},
}


@pytest.fixture
def family() -> Iterator[None]:
    with token_mlp.registered():
        yield


def config(**sections: dict[str, Any]) -> Any:
    merged = {name: keys | sections.get(name, {}) for name, keys in TABLE.items()}
    return convert_config({**sections, **merged})


def run(cluster: Cluster, job: str, wanted: Any, **arguments: Any) -> list[Any]:
    return cluster.run(
        f"support.runs.token_mlp:{job}",
        world_size_of(wanted),
        timeout_s=90.0,
        config=msgspec.to_builtins(wanted),
        **arguments,
    )


def test_an_unregistered_family_is_named_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        convert_config({"model": {**TABLE["model"], "family": "lama"}})
    allowed = ", ".join(repr(name) for name in FAMILIES)
    said = f"model.family = 'lama': allowed are {allowed}; did you mean 'llama'?"
    assert str(caught.value) == said


def test_a_family_brings_its_own_keys_and_rules(family: None, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(dump_toml(config()))
    assert load_config(path) == config()
    assert load_config(path).model.expansion == 3  # pyrefly: ignore
    for override, said in (
        ("model.expansion=0", "model.expansion = 0: must be 1 or more"),
        ("model.expansion=wide", "model.expansion = 'wide': expected `int`"),
        ("model.expanson=1", "did you mean model.expansion?"),
        ("parallel.tensor=2", "no tensor-parallel form"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, [override])
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.expansion is not a key"):
        load_config(path, ["model.family=llama"])


def test_a_new_family_is_planned(family: None) -> None:
    report = plan_report(config(parallel={"pipeline": 2}))
    parameters = 2 * 19 * 16 + 2 * (2 * 16 + 2 * 3 * 16 * 16)
    assert report.parameters == parameters
    chunks = report.as_dict()["chunks"]
    assert [chunk["layers"] for chunk in chunks] == [["embedding", "block.0"], ["block.1", "head"]]
    assert report.renderable() is not None


def test_a_new_family_has_a_reference_to_be_checked_against(family: None) -> None:
    capture = run_reference(tiny_config(config(), 2))
    assert len(capture.losses) == 2
    assert {piece.name for piece in capture.gradients} >= {"embed.weight", "layers.0.norm.bias"}
    assert all(bool(torch.any(piece.values != 0)) for piece in capture.gradients)


@pytest.mark.mp
def test_a_new_family_trains_to_the_same_bits_in_any_layout(family: None, cluster: Cluster) -> None:
    [alone] = run(cluster, "train_steps", config())
    assert len(set(alone["losses"])) == 6
    for layout in ({"pipeline": 2}, {"data": 2, "pipeline": 2}):
        results = run(cluster, "train_steps", config(parallel=layout))
        assert all(result == alone for result in results)


@pytest.mark.mp
def test_a_new_family_is_saved_and_resumed_to_the_same_bits(
    family: None, cluster: Cluster, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(cluster, "train_in", config(), root=str(whole))
    run(cluster, "train_in", config(train={"stop_after": 3}), root=str(parts))
    assert len(metrics_of(parts)) == 3
    run(cluster, "train_in", config(parallel={"pipeline": 2}), root=str(parts))
    exact = [[line["loss_hex"] for line in metrics_of(root)] for root in (whole, parts)]
    assert exact[0] == exact[1]
    described = json.loads((parts / "checkpoints/step-00000006/config.json").read_text())
    no_text = {"bos_token_id": None, "eos_token_id": None}
    own = {"model_type": "token-mlp", "hidden_size": 16, "dtype": "float32"}
    assert described == own | no_text
