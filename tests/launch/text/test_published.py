"""Text from Hugging Face folders of every family, and losses on text, as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.convert import Conversion, convert
from holdfast.launch.text import (
    Sampling,
    describe_model,
    encode_prompts,
    generate,
    load_model,
    text_form,
    text_score,
)
from holdfast.launch.text.tokens import named_tokenizer
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.trainer.models import FAMILIES
from support.runs.tiny_models import EXPERTS, GPT2, make_model

CPU = torch.device("cpu")
CONTEXT = 64
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gpt2": ("GPT2", GPT2 | {"n_positions": CONTEXT}),
    "mixtral": ("Mixtral", EXPERTS),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_group": 4,
            "topk_group": 2,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
            "num_mtp_layers": 0,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
}
"""By family: the name of transformers' classes, and keys that are unlike the defaults."""


def published(family: str, folder: Path, **more: Any) -> Any:
    """transformers' model with random weights and the tokenizer "bytes", saved to a folder."""
    kind, keys = KINDS[family]
    sizes = {} if kind == "GPT2" else {"max_position_embeddings": CONTEXT}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = make_model(kind, folder, **{**keys, **sizes, **ends, "vocab_size": 257, **more})
    for name, content in named_tokenizer("bytes")[0].items():
        (folder / name).write_bytes(content)
    return model.eval()


def texts(place: Path, prompts: list[str], tokens: int) -> list[tuple[list[int], str]]:
    described = describe_model(str(place))
    form = text_form(described.source, described.section)
    known = encode_prompts(prompts, form, vocab=257, context=CONTEXT)
    model = load_model(described, CPU, CONTEXT)
    sizes = {"tokens": tokens, "samples": 1, "context": CONTEXT}
    found = generate(model, form, known, Sampling(), **sizes)
    return [(list(one.tokens), one.text) for one in found]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_losses_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = published(family, tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tmp_path))
    prompts = ["Tyger Tyger", "caf\u00e9"]
    for prompt, (new, text) in zip(prompts, texts(tmp_path, prompts, 30), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        made = theirs.generate(**ids, max_new_tokens=30, do_sample=False)[0].tolist()
        expected = made[ids["input_ids"].shape[1] :]
        assert new == [token for token in expected if token != 256]
        assert prompt + text == tokenizer.decode(made, skip_special_tokens=True)

    described = describe_model(str(tmp_path))
    form = text_form(described.source, described.section)
    model = load_model(described, CPU, CONTEXT, vocab_chunk=100)
    document = "in the forests of the night; \u4f60\u597d".encode()
    windows = {"context": CONTEXT, "stride": CONTEXT, "together": 2}
    score = text_score(model, form, "it", [document, document[:9]], **windows)
    losses = []
    for part in (document, document[:9]):
        ids = torch.tensor([[256, *part]])
        losses.append(theirs(ids, labels=ids).loss.item() * len(part))
    assert score.tokens == score.bytes == len(document) + 9
    assert score.loss == pytest.approx(sum(losses) / score.tokens, rel=1e-5)


@pytest.mark.slow
def test_files_of_any_form_and_type_are_read_and_so_are_converted_checkpoints(
    tmp_path: Path,
) -> None:
    theirs = published("llama", tmp_path / "whole", tie_word_embeddings=True)
    expected = texts(tmp_path / "whole", ["Ty"], 20)
    theirs.save_pretrained(str(tmp_path / "cut"), max_shard_size="20KB")
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    for name in ("cut", "pickled"):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in (tmp_path / "whole").glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pickled" / "pytorch_model.bin")
    convert(Conversion(tmp_path / "whole", tmp_path / "converted", to="holdfast"))
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    for name in ("cut", "pickled", "converted"):
        assert texts(tmp_path / name, ["Ty"], 20) == expected
    convert(Conversion(tmp_path / "whole", tmp_path / "half", to="hf", dtype="F16"))
    described = describe_model(str(tmp_path / "half"))
    half = load_model(described, CPU, CONTEXT)
    for (*_, spec), parameter in half.chunk.rows():
        assert parameter.dtype == torch.float32
        known = theirs.state_dict()[spec.name].half().float()
        found = parameter.data[spec.local_row : spec.local_row + spec.rows]
        torch.testing.assert_close(found, known[spec.box.slices], rtol=0, atol=0)


@pytest.mark.slow
def test_what_is_no_model_of_a_known_family_is_named(tmp_path: Path) -> None:
    published("llama", tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())

    def message(kind: type[Exception], **keys: Any) -> str:
        path.write_text(json.dumps({**told, **keys}))
        with pytest.raises(kind) as caught:
            load_model(describe_model(str(tmp_path)), CPU, CONTEXT)
        return str(caught.value)

    assert "model_type = 'bert': allowed are" in message(ConfigError, model_type="bert")
    assert "hidden_act" in message(ConfigError, hidden_act="gelu")
    assert "contradicts the weights" in message(CheckpointError, hidden_size=64)
    path.unlink()
    with pytest.raises(ConfigError, match="nor a Hugging Face folder"):
        describe_model(str(tmp_path))
