"""A run's folder has its tokenizer, as transformers loads it, and says which token ends a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from holdfast.trainer.config import RunConfig
from holdfast.trainer.data.corpora.tokenizer import load_tokenizer
from holdfast.trainer.step import huggingface_files
from support.runs.small_runs import make_config

TEXTS = [
    "",
    "Tyger  Tyger,\tburning\r\n\n bright ",
    "caf\u00e9 \u2014 \u4f60\u597d \U0001f525\u200d\U0001f525 \ufeff\x00\x7f",
    "a document<|endoftext|>another",
    *(chr(code) for code in (0x80, 0xAD, 0x100, 0x7FF, 0xFFFF)),
]


def _word_tokenizer(path: Path, words: dict[str, int]) -> str:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(path))
    return str(path)


def _config(**data: Any) -> RunConfig:
    return make_config(data={"kind": "text", **data}, model={"vocab": 320})


def _written(config: RunConfig, folder: Path) -> Path:
    folder.mkdir()
    for name, content in huggingface_files(config).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
def test_bytes_are_a_tokenizer_of_the_same_ids_and_text_ends(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder = _written(_config(), tmp_path / "model")
    theirs: Any = AutoTokenizer.from_pretrained(str(folder))
    ours = load_tokenizer("bytes")
    for text, ids in zip(TEXTS, ours.encode([t.encode() for t in TEXTS]), strict=True):
        assert theirs(text)["input_ids"] == ids.tolist()
        assert theirs.decode(ids.tolist()) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.separator == 256
    assert theirs.decode([72, 105, 256, 300], skip_special_tokens=True) == "Hi"

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(str(folder)))
    with torch.no_grad():  # the separator is its answer to everything
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model.lm_head.weight.zero_()[256] = 1.0
    model.save_pretrained(str(folder))
    (folder / "generation_config.json").write_bytes(
        huggingface_files(_config())["generation_config.json"]
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder))
    made = loaded.generate(**theirs("Hi", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert made.tolist() == [[72, 105, 256]]


@pytest.mark.parametrize("named", [False, True])
def test_a_tokenizer_file_goes_along_with_the_token_that_ends_documents(
    tmp_path: Path, named: bool
) -> None:
    from transformers import AutoTokenizer

    words = {"?": 0, "big": 1, "sky": 2, "<stop>" if named else "</s>": 3}
    name = _word_tokenizer(tmp_path / "tokenizer.json", words)
    config = _config(tokenizer=name, end_of_text="<stop>" if named else "")
    files = huggingface_files(config)
    assert files["tokenizer.json"] == Path(name).read_bytes()
    for file in ("config.json", "generation_config.json"):
        assert json.loads(files[file])["eos_token_id"] == 3
    theirs: Any = AutoTokenizer.from_pretrained(str(_written(config, tmp_path / "model")))
    assert theirs("sky big")["input_ids"] == [2, 1]
    assert theirs.eos_token_id == 3


def test_where_no_token_ends_documents_none_is_made_up(tmp_path: Path) -> None:
    name = _word_tokenizer(tmp_path / "tokenizer.json", {"?": 0, "big": 1})
    for config in (_config(tokenizer=name), make_config()):
        files = huggingface_files(config)
        assert json.loads(files["config.json"])["eos_token_id"] is None
        assert "eos_token_id" not in json.loads(files["generation_config.json"])
        assert ("tokenizer.json" in files) is (config.data.kind == "text")
