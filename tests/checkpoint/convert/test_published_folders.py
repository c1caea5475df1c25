"""Published folders are read as transformers reads them, and what is passed over is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.checkpoint.model_config import contradictions
from holdfast.checkpoint.model_config.weights import weights_of as config_weights
from holdfast.parallel.errors import CheckpointError
from support.foreign.conversions import converted

SIZES = {"vocab_size": 24, "max_position_embeddings": 16}


def make_model(folder: Path, kind: str, **keys: Any) -> dict[str, Tensor]:
    import transformers

    torch.manual_seed(1)
    if kind == "GPT2":
        sizes = {"vocab_size": 24, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
        config = transformers.GPT2Config(**sizes, **keys)
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
        wide = {"hidden_size": 8, "intermediate_size": 12}
        config = transformers.LlamaConfig(**SIZES, **heads, **wide, **keys)
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(str(folder))
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, {"format": "pt"})
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder)).state_dict()


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_buffers_and_a_bare_base_model_are_accepted(tmp_path: Path, kind: str, to: str) -> None:
    found = make_model(tmp_path / "hf", kind)
    expected = weights_of(tmp_path / "hf")
    prefix = {"Llama": "model.", "GPT2": "transformer."}[kind]
    buffers = {
        "Llama": {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)},
        "GPT2": {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)},
    }[kind]
    write(tmp_path / "hf", {n.removeprefix(prefix): t for n, t in found.items()} | buffers)
    done = converted(tmp_path / "hf", tmp_path / "there", to)
    assert {n: w for n, w in done.left_out.items() if n in buffers} == dict.fromkeys(
        buffers, "a buffer that the model computes by itself"
    )
    back = tmp_path / "there"
    if to == "megatron":
        converted(tmp_path / "there", back := tmp_path / "back", "hf")
    again = weights_of(back)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_of_several_files_those_count_that_transformers_loads(tmp_path: Path) -> None:
    found = make_model(tmp_path / "hf", "Llama")
    other = {name: value + 1 for name, value in found.items()}
    shard = "model-00001-of-00001.safetensors"
    write(tmp_path / "hf", other, shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, shard)}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    write(tmp_path / "hf", {"w": torch.ones(2)}, "consolidated.safetensors")
    torch.save(other, tmp_path / "hf/pytorch_model.bin")
    expected = weights_of(tmp_path / "hf")
    assert torch.equal(expected["model.norm.weight"], found["model.norm.weight"])
    done = converted(tmp_path / "hf", tmp_path / "one", "hf")
    assert set(done.left_out) == {
        "model.safetensors.index.json", "pytorch_model.bin", "consolidated.safetensors", shard,
    }  # fmt: skip
    again = load_file(tmp_path / "one/model.safetensors")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], value) for name, value in found.items())
    # Without the single file, the index counts.
    (tmp_path / "hf/model.safetensors").unlink()
    converted(tmp_path / "hf", tmp_path / "two", "hf")
    again = load_file(tmp_path / "two/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in other.items())


TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model.v3", "tekken.json",
    "qwen.tiktoken", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "chat_template.jinja",
    "special_tokens_map.json", "additional_chat_templates/tools.jinja",
)  # fmt: skip
OTHERS = {
    "README.md": "no part of",
    "modeling_own.py": "code, which is not copied",
    "tf_model.h5": "other files of weights",
    "original/": "no part of",
    "additional_chat_templates/NOTE.md": "no part of",
    "vocab.txt": "a link that leads nowhere",
}


@pytest.mark.parametrize(
    ("to", "at"),
    [
        ("hf", ""),
        ("dcp", ""),
        ("deepspeed-universal", ""),
        ("megatron", "release"),
        ("megatron-legacy", "release"),
        ("holdfast", ""),
    ],
)
def test_the_tokenizers_files_go_along_and_all_others_are_named(
    tmp_path: Path, to: str, at: str
) -> None:
    source = tmp_path / "hf"
    make_model(source, "Llama")
    for folder in ("original", "additional_chat_templates", ".git"):
        (source / folder).mkdir()
    for name in (*TOKENIZER, *OTHERS, "original/params.json", ".git/config"):
        if name == "vocab.txt":
            (source / name).symlink_to("nowhere")
        elif not name.endswith("/"):
            (source / name).write_bytes(b'{"of": "' + name.encode() + b'"}\r\n')
    done = converted(source, tmp_path / "out", to)
    inner = "additional_chat_templates/tools.jinja"
    left = OTHERS | ({inner: "holdfast has no folders"} if to == "holdfast" else {})
    assert set(done.left_out) == set(left)
    assert all(why in done.left_out[name] for name, why in left.items())
    assert not any(".git" in name for name in done.left_out)
    for name in TOKENIZER:
        made = tmp_path / "out" / at / name
        assert made.exists() == (name not in left), name
        assert name in left or made.read_bytes() == (source / name).read_bytes()
    assert not any((tmp_path / "out" / at / name).exists() for name in OTHERS)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_tied_is_left_out_only_if_it_is_equal(tmp_path: Path, equal: bool) -> None:
    found = make_model(tmp_path / "hf", "Llama", tie_word_embeddings=True)
    head = found["model.embed_tokens.weight"].clone()
    if not equal:
        head[-1, -1] += 1
    write(tmp_path / "hf", {**found, "lm_head.weight": head})
    done = converted(tmp_path / "hf", tmp_path / "out", "hf")
    assert ("lm_head.weight" in done.left_out) is equal
    # transformers ties neither, where they differ.
    assert torch.equal(weights_of(tmp_path / "out")["lm_head.weight"], head)
    converted(tmp_path / "hf", tmp_path / "megatron", "megatron")
    converted(tmp_path / "megatron", tmp_path / "back", "hf")
    assert torch.equal(weights_of(tmp_path / "back")["lm_head.weight"], head)
    common = torch.load(tmp_path / "megatron/release/common.pt", weights_only=False)
    assert common["args"].untie_embeddings_and_output_weights is not equal


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    write(adapter, {"base_model.model.q.lora_A.weight": torch.ones(2)}, "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        converted(adapter, tmp_path / "out", "hf")


def test_names_and_counters_of_a_trainer_do_not_become_weights(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    layer = "layers.0.attention.wq.weight"
    state = {
        "tok_embeddings.weight": torch.ones(4, 2),
        layer: torch.ones(2, 2),
        "train_state": {"step": torch.tensor(3), "ntokens_seen": torch.tensor(60)},
        "lr_scheduler": {"last_epoch": torch.tensor(3)},
    }
    dcp.save(state, checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    with pytest.raises(CheckpointError, match=rf"{layer} is a name of torchtitan .*order"):
        converted(tmp_path / "step-3", tmp_path / "out", "hf")
    done = converted(tmp_path / "step-3", tmp_path / "ours", "holdfast")
    assert done.tensors == {"weight": 2}
    counters = {"train_state/step", "train_state/ntokens_seen", "lr_scheduler/last_epoch"}
    assert set(done.left_out) == counters
    # Nor does the way over our own format make them names of transformers.
    with pytest.raises(CheckpointError, match="torchtitan"):
        converted(tmp_path / "ours", tmp_path / "out", "hf")
    several = {"net": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}
    dcp.save(several, checkpoint_id=str(tmp_path / "two"), no_dist=True)
    with pytest.raises(CheckpointError, match=r"(net|ema)/w is a path in a state of more than a"):
        converted(tmp_path / "two", tmp_path / "out", "hf")


CONTRADICTIONS = [
    ("Llama", "num_hidden_layers", 3),
    ("Llama", "num_hidden_layers", 1),
    ("Llama", "vocab_size", 32),
    ("Llama", "hidden_size", 16),
    ("Llama", "intermediate_size", 24),
    ("Llama", "num_attention_heads", 4),
    ("Llama", "num_key_value_heads", 2),
    ("Llama", "head_dim", 8),
    ("Llama", "tie_word_embeddings", False),
    ("GPT2", "n_layer", 3),
    ("GPT2", "vocab_size", 32),
    ("GPT2", "n_embd", 16),
    ("GPT2", "n_positions", 32),
    ("GPT2", "n_inner", 16),
]


@pytest.mark.parametrize(("kind", "key", "value"), CONTRADICTIONS)
def test_a_config_json_that_contradicts_the_weights_is_refused_by_name(
    tmp_path: Path, kind: str, key: str, value: int
) -> None:
    make_model(tmp_path / "hf", kind, **({"tie_word_embeddings": True} if kind == "Llama" else {}))
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=rf"contradicts the weights: .*{key}"):
        converted(tmp_path / "hf", tmp_path / "out", "hf")


@pytest.mark.parametrize("to", ["dcp", "holdfast", "deepspeed-universal", "megatron"])
def test_a_config_json_given_beside_any_source_is_compared_with_its_weights(
    tmp_path: Path, to: str
) -> None:
    make_model(tmp_path / "hf", "Llama")
    converted(tmp_path / "hf", tmp_path / "there", to)
    other = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text(json.dumps(other))
    given = {"model_files": tmp_path / "files"}
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        converted(tmp_path / "there", tmp_path / "out", "hf", **given)
    (tmp_path / "files" / "config.json").write_text(json.dumps({**other, "num_hidden_layers": 2}))
    converted(tmp_path / "there", tmp_path / "out", "hf", **given)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 0.5), ("num_attention_heads", 1), ("rope_theta", 7.0), ("vocab_size", 23)],
)
def test_a_config_json_beside_megatrons_arguments_says_what_they_say(
    tmp_path: Path, key: str, value: float
) -> None:
    make_model(tmp_path / "hf", "Llama", head_dim=4)
    converted(tmp_path / "hf", tmp_path / "there", "megatron-legacy")
    [path] = (tmp_path / "there").glob("*/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: value, "rope_parameters": None}))
    with pytest.raises(CheckpointError, match="(?s)config.json.*" + key):
        converted(tmp_path / "there", tmp_path / "out", "hf")
    path.write_text(json.dumps(config))
    converted(tmp_path / "there", tmp_path / "out", "hf")


def test_a_folder_without_all_weights_is_refused_and_one_is_named(tmp_path: Path) -> None:
    found = make_model(tmp_path / "hf", "Llama")
    (tmp_path / "hf/model.safetensors").unlink()
    names = sorted(found)
    write(tmp_path / "hf", {n: found[n] for n in names[:9]}, "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"has 1 of the 2 files .* no index"):
        converted(tmp_path / "hf", tmp_path / "out", "hf")
    # An index that lists one of two files, a weight too few, names with a prefix.
    index = {"weight_map": dict.fromkeys(names[:9], "model-00001-of-00002.safetensors")}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="contradicts the weights"):
        converted(tmp_path / "hf", tmp_path / "out", "holdfast")
    lost = "model.layers.1.mlp.up_proj.weight"
    for tensors, said in (
        ({n: t for n, t in found.items() if n != lost}, f"without {lost}"),
        ({f"module.{n}": t for n, t in found.items()}, "without model.embed_tokens.weight"),
    ):
        write(tmp_path / "hf", tensors)
        with pytest.raises(CheckpointError, match=said):
            converted(tmp_path / "hf", tmp_path / "out", "hf")


def test_no_number_of_layers_makes_the_search_for_weights_long() -> None:
    said = {"model_type": "llama", "num_hidden_layers": 1 << 62}
    shapes = {"model.embed_tokens.weight": (24, 8), "model.norm.weight": (8,)}
    assert [line for line in contradictions(said, shapes) if "without model.layers.0." in line]
    shapes[f"model.layers.{(1 << 62) - 1}.input_layernorm.weight"] = (8,)
    assert [line for line in contradictions(said, shapes) if "without model.layers.0." in line]


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe", "GPT2"])
def test_the_weights_of_a_config_are_those_that_transformers_saves(kind: str) -> None:
    import transformers

    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_experts": 3, "num_local_experts": 3, "moe_intermediate_size": 4}
    more = experts if "M" in kind else {}
    if kind != "GPT2":
        more = {"intermediate_size": 4, "num_key_value_heads": 1, **more}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    said = {"model_type": config.model_type, **config.to_dict()}
    other = ("lm_head.", ".experts.", "mlp.gate.")
    expected = {n for n in model.state_dict() if not any(part in n for part in other)}
    assert set(config_weights(said, layers=2)) == expected
