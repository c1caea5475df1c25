"""Training begins from converted weights: in 16 bits, elastic, again by one command, or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.convert.work.job import convert
from holdfast.checkpoint.convert.work.request import Conversion
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import EVERY_CHANGE, RunConfig, dump_toml
from holdfast.trainer.run.resume import find_resume
from support.foreign.conversions import tensors_of
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, fault
from support.runs.small_runs import events_of, make_config, metrics_of, run_in

MODEL = {"layers": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("model") / "hf"
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def converted(source: Path, target: Path, dtype: str = "") -> Path:
    assert convert(Conversion(source, target, "holdfast", dtype=dtype)) is not None
    return target


def train(cluster: Cluster, config: RunConfig, root: Path, start: Path) -> None:
    run_in(cluster, config, root, resume=str(start))


@pytest.mark.mp
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_begins_with_the_converted_weights_and_the_same_command_goes_on(
    cluster: Cluster, tmp_path: Path, hugging_face: Path, precision: str
) -> None:
    dtype = {"fp32": "F32", "bf16": "BF16"}[precision]
    start = converted(hugging_face, tmp_path / "start", dtype)
    sections: dict[str, Any] = {
        "model": MODEL,
        # Moments are made, and weights stay.
        "optimizer": {"lr": 0.0, "min_lr": 0.0},
        "checkpoint": {"every": 1},
        "parallel": {"data": 2},
    }
    train(
        cluster,
        make_config(train={"steps": 1, "precision": precision}, **sections),
        tmp_path / "run",
        start,
    )
    weights = tensors_of(start)
    found = tensors_of(tmp_path / "run/checkpoints/step-00000001")
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
        assert found[f"exp_avg.{name}"].any()
        if precision == "bf16":
            assert torch.equal(found[f"master.{name}"], value.float())
    [note] = events_of(tmp_path / "run", "resume_note")
    assert note["message"].startswith(f"starts from the weights of {start}, converted: 21 tensors")
    longer = make_config(train={"steps": 2, "precision": precision}, **sections)
    train(cluster, longer, tmp_path / "run", start)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    notes = [event["message"] for event in events_of(tmp_path / "run", "resume_note")]
    assert any("has checkpoints of its own" in note for note in notes)


@pytest.mark.mp
@pytest.mark.slow
def test_an_elastic_run_that_loses_all_before_its_first_checkpoint_begins_with_them_again(
    cluster: Cluster, tmp_path: Path, hugging_face: Path
) -> None:
    start = converted(hugging_face, tmp_path / "start", "BF16")
    sections: dict[str, Any] = {
        "model": MODEL,
        "train": {"steps": 4, "precision": "bf16"},
        "parallel": {"data": 2},
        "log": {"tensorboard": False},
    }
    train(cluster, make_config(**sections), tmp_path / "calm", start)
    faults = [fault("kill", rank, 2, "backward") for rank in (0, 1)]
    elastic = {"enabled": True, "local_nodes": 2, "chaos": faults}
    (tmp_path / "run.toml").write_text(dump_toml(make_config(elastic=elastic, **sections)))
    starter = Starter(tmp_path)
    try:
        run = starter.start(tmp_path / "run.toml", "run", "--resume", str(start))
        assert run.finish() == 0, run.output()
        assert len(run.events("fault_injected")) == 2
        expected = metrics_of(tmp_path / "calm")
        assert [s["loss_hex"] for s in run.steps()] == [s["loss_hex"] for s in expected]
    finally:
        starter.close()


def test_what_does_not_fit_is_said_before_a_worker_starts(
    tmp_path: Path, hugging_face: Path
) -> None:
    start = converted(hugging_face, tmp_path / "start")

    def wanted(*allow_change: str, **sections: dict[str, Any]) -> tuple[str, ...]:
        config = make_config(**{"model": MODEL, **sections})
        return find_resume(tmp_path / "run", config, str(start), allow_change=allow_change).notes

    [note] = wanted()
    assert note.endswith("21 tensors F32, step 0, no moments")
    with pytest.raises(ConfigError, match=r"is F32, and train\.precision = 'bf16' needs BF16"):
        wanted(train={"precision": "bf16"})
    with pytest.raises(ConfigError, match=r"model\.layers = 6 \(its config\.json has 2\)"):
        wanted(model={})
    described = json.loads((start / "config.json").read_text())
    shutil.copytree(start, tmp_path / "other")
    described["rope_parameters"] = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
    (start / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"rope_theta = 10000\.0 .*500000.*rope_scaling"):
        wanted()
    with pytest.raises(ConfigError, match="rope_scaling") as caught:
        wanted("model.rope_theta")
    option = str(caught.value).rpartition("--allow-change ")[2]
    assert len(wanted(*option.split(","))) == 3


def test_weights_without_a_place_in_the_model_are_refused_even_if_changes_are_allowed(
    tmp_path: Path, hugging_face: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def start(name: str, config: dict[str, Any] | None, **tensors: torch.Tensor | None) -> Path:
        folder = shutil.copytree(hugging_face, tmp_path / f"{name}-hf")
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**described, **(config or {})}))
        if config is None:
            (folder / "config.json").unlink()
        weights = {**load_file(folder / "model.safetensors"), **tensors}
        kept = {key: value for key, value in weights.items() if value is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        return converted(folder, tmp_path / name)

    def wanted(folder: Path, **sections: Any) -> tuple[str, ...]:
        config = make_config(model=MODEL | sections.get("model", {}))
        return find_resume(tmp_path / "run", config, str(folder), allow_change=EVERY_CHANGE).notes

    bias, norm = "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"
    biased = start("biased", {"attention_bias": True}, **{bias: torch.ones(32)})
    with pytest.raises(ConfigError, match=rf"{bias} is of no use to the model"):
        wanted(biased)
    with pytest.raises(ConfigError, match=rf"{norm} is missing"):
        wanted(start("short", None, **{norm: None}))
    # Without a config.json the names and shapes are all there is.
    bare = start("bare", None)
    assert len(wanted(bare)) == 1
    for sizes in ({"hidden": 16}, {"layers": 1}, {"intermediate": 24}, {"vocab": 60}):
        with pytest.raises(ConfigError, match=r"does not hold the weights of \[model\]"):
            wanted(bare, model=sizes)
    # A missing key is what transformers takes it for, not what [model] has.
    silent = start("silent", {})
    described = json.loads((silent / "config.json").read_text())
    (silent / "config.json").write_text(
        json.dumps({key: value for key, value in described.items() if key != "rms_norm_eps"})
    )
    assert any("norm_eps = 1e-05 (its config.json has 1e-06)" in note for note in wanted(silent))
    (silent / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        wanted(silent)


@pytest.mark.mp
def test_a_run_of_another_size_is_not_cut_to_fit(cluster: Cluster, tmp_path: Path) -> None:
    run_in(cluster, make_config(train={"steps": 1}, checkpoint={"every": 1}), tmp_path / "run")
    saved = str(tmp_path / "run/checkpoints/step-00000001")
    for sizes in ({"layers": 5}, {"intermediate": 24}, {"vocab": 60}):
        config = make_config(model=sizes)
        with pytest.raises(ConfigError, match="of another run"):
            find_resume(tmp_path / "new", config, saved)
        with pytest.raises(ConfigError, match="does not hold the weights"):
            find_resume(tmp_path / "new", config, saved, allow_change=EVERY_CHANGE)
    config = make_config(model={"rope_theta": 500.0})
    notes = find_resume(tmp_path / "new", config, saved, allow_change=EVERY_CHANGE).notes
    assert any("model.rope_theta = 500.0" in note for note in notes)
