"""Models of transformers become checkpoints that train, and come back as models it opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.tools.verify import verify_checkpoint
from holdfast.launch.commands.convert import summary_lines
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.trainer.config import RunConfig
from holdfast.trainer.models.chunk import build_whole_model
from support.foreign.conversions import converted
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, run_in


def save_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    import transformers

    torch.manual_seed(3)
    common = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2}
    wide = {
        **common,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    sizes = {
        "Llama": wide,
        "Qwen2": wide,
        "Qwen3": {**wide, "head_dim": 16},
        "Mixtral": {**wide, "num_local_experts": 4},
        "Qwen3Moe": {
            **wide,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        "GPT2": {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    }[kind]
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**sizes, **keys)
    model = getattr(transformers, name)(config).to(dtype)
    model.save_pretrained(str(folder), max_shard_size="60KB")
    return model


@pytest.mark.parametrize("through", ["dcp", "deepspeed-universal"])
@pytest.mark.parametrize("kind", ["GPT2", "Mixtral", "Qwen3Moe"])
def test_names_and_files_pass_through_other_formats(
    tmp_path: Path, kind: str, through: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "hf", kind)
    converted(tmp_path / "hf", tmp_path / "there", through)
    converted(tmp_path / "there", tmp_path / "back", "hf")
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "back"))
    described = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "back")]
    assert described[0] == described[1]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe"])
def test_a_model_goes_to_holdfast_and_back_unchanged(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "hf", kind, torch.bfloat16)
    (tmp_path / "hf/tokenizer.json").write_text('{"version": "1.0"}')
    there = converted(tmp_path / "hf", tmp_path / "ours", "holdfast")
    assert there.source_format == "hf"
    assert there.compared > 0
    assert verify_checkpoint(tmp_path / "ours") == []
    converted(tmp_path / "ours", tmp_path / "back", "hf")
    assert (tmp_path / "back/tokenizer.json").read_text() == '{"version": "1.0"}'
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "back"))
    assert again.dtype == torch.bfloat16
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_older_folders_are_read_without_their_pickles(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = save_model(tmp_path / "hf", "Llama")
    for file in (tmp_path / "hf").glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "hf/pytorch_model.bin")
    converted(tmp_path / "hf", tmp_path / "new", "hf")
    found = load_file(tmp_path / "new/model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_rounding_is_torchs_and_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = save_model(tmp_path / "hf", "Llama")
    made = converted(tmp_path / "hf", tmp_path / "half", "hf", dtype="BF16")
    assert made.rounded == {("F32", "BF16"): made.tensors["weight"]}
    found = load_file(tmp_path / "half/model.safetensors")
    for name, value in found.items():
        assert torch.equal(value, model.state_dict()[name].to(torch.bfloat16))
    assert '"bfloat16"' in (tmp_path / "half/config.json").read_text()
    converted(tmp_path / "half", tmp_path / "wide", "hf", dtype="F32")
    wide = load_file(tmp_path / "wide/model.safetensors")
    assert all(torch.equal(wide[name], value.float()) for name, value in found.items())


def logits_of(config: RunConfig, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from holdfast.checkpoint import load

    ours = build_whole_model(
        config.model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seq_len=config.train.seq_len,
        micro_batch=3,
        seed=1,
    )
    buffer = ParameterBuffer(ours.rows())
    weights = {s.spec.name: buffer.view(s) for s in buffer.segments}
    load(folder, weights)
    for segment in buffer.segments:
        buffer.view(segment).copy_(weights[segment.spec.name])
    return ours.logits(tokens)


@pytest.mark.mp
@pytest.mark.slow
def test_a_converted_model_trains_and_goes_back(cluster: Cluster, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "hf", "Llama", rope_theta=10000.0)
    converted(tmp_path / "hf", tmp_path / "start", "holdfast")
    config = make_config(
        model={"dropout": 0.0, "layers": 2, "norm_eps": model.config.rms_norm_eps},
        train={"steps": 2},
        checkpoint={"every": 2},
        parallel={"tensor": 2, "pipeline": 1, "data": 2},
    )
    tokens = torch.randint(67, (3, 16), generator=torch.Generator().manual_seed(5))
    before = logits_of(config, tmp_path / "start", tokens)
    torch.testing.assert_close(before, model(tokens).logits, rtol=0, atol=1e-5)
    run_in(cluster, config, tmp_path / "run", resume=str(tmp_path / "start"))
    trained = tmp_path / "run/checkpoints/step-00000002"
    made = converted(tmp_path / "run", tmp_path / "out", "hf")
    assert made.step == 2
    assert any("weights only" in why for why in made.left_out.values())
    theirs: Any = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    after = logits_of(config, trained, tokens)
    torch.testing.assert_close(after, theirs(tokens).logits, rtol=0, atol=1e-5)
    assert not torch.equal(before, after)


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "Llama")
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    first = shards[0]

    def damaged(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "hf", tmp_path / name))

    missing = damaged("missing")
    (missing / first.name).unlink()
    with pytest.raises(CheckpointError, match=first.name):
        converted(missing, tmp_path / "a", "holdfast")
    short = damaged("short")
    (short / first.name).write_bytes(first.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        converted(short, tmp_path / "b", "holdfast")
    swapped = damaged("swapped")
    (swapped / first.name).write_bytes(shards[1].read_bytes())
    with pytest.raises(CheckpointError, match="index says"):
        converted(swapped, tmp_path / "c", "holdfast")
    with pytest.raises(ConfigError, match="not empty"):
        converted(tmp_path / "hf", tmp_path / "short", "holdfast")
    with pytest.raises(ConfigError, match="does not exist"):
        converted(tmp_path / "nothing", tmp_path / "d", "holdfast")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no checkpoint of a known format .* --map RULES.toml"):
        converted(tmp_path / "empty", tmp_path / "d", "holdfast")
    assert not list(tmp_path.glob("[abcd]*.partial"))


def test_damage_in_a_checkpoint_is_found_before_it_is_converted(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", "Llama")
    converted(tmp_path / "hf", tmp_path / "ours", "holdfast")
    [file] = (tmp_path / "ours").glob("model-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-50] ^= 4
    file.write_bytes(content)
    for dtype in ("", "BF16"):
        with pytest.raises(CheckpointError, match="is damaged"):
            converted(tmp_path / "ours", tmp_path / "out", "hf", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_summary_is_sentences_and_names_the_config_that_is_missing(tmp_path: Path) -> None:
    """Rules of one's own give weights alone, which transformers does not open."""
    weights = {"fc": torch.ones(2, 2), "table": torch.ones(3), "cache0": torch.ones(1)}
    torch.save({**weights, "cache1": torch.ones(1)}, tmp_path / "model.pt")
    rules = tmp_path / "rules.toml"
    rules.write_text(
        'format = "mine"\nfiles = ["model.pt"]\n[[skip]]\nsource = "cache*"\n'
        'because = "it is computed"\n'
        '[[rule]]\nsource = "fc"\ntarget = "fc.weight"\n'
        '[[rule]]\nsource = "table"\ntarget = "table"\n'
    )
    done = converted(tmp_path, tmp_path / "hf", "hf", rules=rules)
    first, *lines, checked = summary_lines(done)
    assert first.startswith(f"{tmp_path}/hf has step 0 of the files checkpoint, 2 tensors of kind ")
    assert checked.startswith("checked: every byte")
    assert lines[:3] == [
        "read by the rule fc: 1 tensor",
        "read by the rule table: 1 tensor",
        "cache0 and 1 more are left out: it is computed",
    ]
    assert lines[3].startswith("config.json is left out: the source has none, ")
    assert "--model-files" in lines[3]
    assert len(lines) == 4
