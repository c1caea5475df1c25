"""Training begins with a model that transformers made, and ends as one that it opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.checkpoint.stores import find_checkpoint
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import load_config
from holdfast.trainer.run.initial_weights import (
    FIRST_WEIGHTS,
    check_tensors,
    first_weights,
    take_first_weights,
)
from support.oracles.transformers_models import SIZES
from support.runs.commands import holdfast

CONFIG = """
[data]
kind = "text"
path = ["corpus.txt"]
[train]
steps = 2
seq_len = 16
global_batch = 4
eval_every = 0
[optimizer]
warmup_steps = 1
lr = {lr}
min_lr = 0.0
[log]
tensorboard = false
"""
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "gpt2": {"n_inner": 24, "intermediate_size": None, "num_key_value_heads": None},
    "deepseek_v3": {
        "num_key_value_heads": SIZES["heads"],
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def made(folder: Path, kind: str, **keys: Any) -> Any:
    """A model with transformers' own initial weights, saved in bf16."""
    import transformers

    torch.manual_seed(4)
    sizes = {
        "vocab_size": 320,
        "hidden_size": SIZES["hidden"],
        "intermediate_size": SIZES["intermediate"],
        "num_hidden_layers": 2,
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"],
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # so that the likeliest token is not a tie
    }
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(str(folder))
    return model.float().eval()


def with_second_tokens(folder: Path) -> dict[str, torch.Tensor]:
    """Give a folder of DeepSeek-V3 the layer for second tokens, as published ones have it.

    Returns what it has beside the copies of the model's own weights.
    """
    weights = load_file(folder / "model.safetensors")
    own = {
        name.replace("layers.1.", "layers.2."): value.clone()
        for name, value in weights.items()
        if "layers.1." in name
    }
    norms = ("enorm", "hnorm", "shared_head.norm")
    own |= {f"model.layers.2.{name}.weight": torch.ones(32, dtype=torch.bfloat16) for name in norms}
    joining = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    own["model.layers.2.eh_proj.weight"] = joining
    copies = {
        "model.layers.2.embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.2.shared_head.head.weight": weights["lm_head.weight"].clone(),
    }
    save_file(weights | own | copies, folder / "model.safetensors", {"format": "pt"})
    return own


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that the index of a folder names."""
    told = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(told.values())}
    return {name: files[file][name] for name, file in told.items()}


def generated(model: Any) -> list[int]:
    prompt = torch.arange(3, 11)[None]
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
    )[0].tolist()


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_is_trained_and_is_a_folder_again(kind: str, tmp_path: Path) -> None:
    """With a learning rate of nearly 0 the text stays; else it is another, which transformers
    generates from our folder as from the weights in it."""
    import transformers

    theirs = made(tmp_path / "model", kind, **MODELS[kind])
    further = with_second_tokens(tmp_path / "model") if kind == "deepseek_v3" else {}
    (tmp_path / "corpus.txt").write_text("To be, or not to be: that is the question. " * 40)
    texts = []
    for lr in ("1e-12", "3e-2"):
        (tmp_path / "c.toml").write_text(CONFIG.format(lr=lr))
        run = tmp_path / f"run-{lr}"
        done = holdfast(
            tmp_path, "train", "c.toml", "--from-hf", "model", "--out", str(run), timeout_s=120
        )
        assert done.returncode == 0, done.stderr
        opened = transformers.AutoModelForCausalLM.from_pretrained(
            str(run / "checkpoints" / "step-00000002")
        )
        texts.append(generated(opened))
        saved = weights_in(run / "checkpoints/step-00000002")
        assert {name for name in saved if ".layers.2." in name} == further.keys()
        for name, value in further.items():
            moves = lr == "3e-2" or name.endswith("e_score_correction_bias")
            if not moves:
                torch.testing.assert_close(saved[name], value.float(), rtol=1e-5, atol=1e-9)
            elif "eh_proj" in name:
                assert not torch.allclose(saved[name], value.float(), rtol=1e-3)
        if further:
            told = json.loads((run / "checkpoints/step-00000002/config.json").read_text())
            assert told["num_nextn_predict_layers"] == 1
    assert texts[0] == generated(theirs) != texts[1]
    again = holdfast(tmp_path, "train", "c.toml", "--from-hf", "model", "--out", str(run))
    assert again.returncode == 0
    assert "step 1/2" not in again.stdout


@pytest.mark.slow
def test_a_key_may_differ_from_the_folder_s_where_the_option_names_it(tmp_path: Path) -> None:
    made(tmp_path / "model", "gpt2", **MODELS["gpt2"])
    path = tmp_path / "c.toml"
    path.write_text(f'[model]\nfrom_hf = "{tmp_path / "model"}"\nnorm_eps = 1e-4\n')
    config = load_config(path, ["train.seq_len=16"])
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"--allow-change model\.norm_eps$"):
        take_first_weights(tmp_path, config, said.append)
    take_first_weights(tmp_path, config, said.append, allow_change=("model.norm_eps",))
    assert [line.split(":")[0] for line in said] == [f"took the weights of {tmp_path / 'model'}"]
    assert first_weights(tmp_path, config) == tmp_path / FIRST_WEIGHTS


def test_the_layer_for_second_tokens_may_stay_untrained(tmp_path: Path) -> None:
    """A folder without it, which says that it has one, names what it lacks."""
    made(folder := tmp_path / "model", "deepseek_v3", **MODELS["deepseek_v3"])
    path = tmp_path / "c.toml"
    path.write_text(f'[model]\nfrom_hf = "{folder}"\n')
    without = load_config(path, ["train.seq_len=16", "model.multi_token_layers=0"])
    config = load_config(path, ["train.seq_len=16"])
    assert (without.model.multi_token_layers, config.model.multi_token_layers) == (0, 1)  # pyrefly: ignore
    for root, layers in ((tmp_path / "lacks", 0), (tmp_path / "has", 1)):
        own = with_second_tokens(folder) if layers else {}
        take_first_weights(root, config, lambda _: None)
        manifest = find_checkpoint(str(root / FIRST_WEIGHTS)).manifest()
        check_tensors(manifest, without, str(root))
        if layers:
            check_tensors(manifest, config, str(root))
            names = {name for name in manifest.tensors if ".layers.2." in name}
            assert names == own.keys(), "copies of the model's weights are left out"
        else:
            with pytest.raises(ConfigError, match=r"layers\.2\.enorm\.weight is missing"):
                check_tensors(manifest, config, str(root))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.embed_tokens.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    take_first_weights(tmp_path / "other", config, lambda _: None)
    manifest = find_checkpoint(str(tmp_path / "other" / FIRST_WEIGHTS)).manifest()
    check_tensors(manifest, without, "other")
    with pytest.raises(ConfigError, match=r"layers\.2\.embed_tokens\.weight is of no use"):
        check_tensors(manifest, config, "other")


def test_a_folder_gives_the_keys_that_are_not_set(tmp_path: Path) -> None:
    described = {
        "model_type": "qwen2",
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "tokenizer.json").write_text("{}")
    path = tmp_path / "c.toml"
    path.write_text(f'[model]\nfrom_hf = "{folder}"\ndropout = 0.1\nvocab = 320\n')
    config = load_config(path)
    model: Any = config.model
    assert (model.family, model.hidden, model.layers, model.heads) == ("qwen2", 48, 5, 6)
    assert (model.kv_heads, model.sliding_window, model.max_window_layers) == (3, 7, 2)
    assert (model.dropout, model.vocab) == (0.1, 320)


def test_what_no_key_says_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = tmp_path / "c.toml"
    path.write_text(f'[model]\nfrom_hf = "{folder}"\n')
    with pytest.raises(ConfigError, match="name the folder of a Hugging Face model"):
        load_config(path)
    for described, said in (
        ({"model_type": "bert"}, "model_type is 'bert'; allowed are"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'"),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "accepted are full_attention for the lower layers",
        ),
    ):
        (folder / "config.json").write_text(json.dumps(described))
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert said in str(caught.value)
