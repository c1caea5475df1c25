"""An unset vocabulary is the tokenizer's, as the tokenizer's own library counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import load_config
from holdfast.trainer.config.vocabulary import tokenizer_vocab
from holdfast.trainer.data.corpora.tokenizer import load_tokenizer

WORDS = {"?": 0, "a": 1, "b": 2, "far": 999}
MODELS = {
    "words": models.WordLevel(WORDS, unk_token="?"),
    "pairs": models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
    "pieces": models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0, False),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_ids_of_a_file_are_counted_as_its_library_counts_them(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "tok.json"
    tokenizer = tokenizers.Tokenizer(MODELS[kind])
    tokenizer.save(str(path))
    assert tokenizer_vocab(str(path)) == load_tokenizer(str(path)).vocab
    tokenizer.add_special_tokens(["<end>", "a", "<pad>"])
    tokenizer.save(str(path))
    assert tokenizer_vocab(str(path)) == load_tokenizer(str(path)).vocab


def test_an_unset_vocabulary_is_the_tokenizers_rounded_up(smallest: Path, tmp_path: Path) -> None:
    path = tmp_path / "tok.json"
    tokenizers.Tokenizer(MODELS["words"]).save(str(path))
    text = ["data.kind=text", f"data.tokenizer={path}"]
    assert load_config(smallest, text).model.vocab == 1024
    assert load_config(smallest, [*text, "model.vocab=1000"]).model.vocab == 1000
    with pytest.raises(ConfigError, match=r"model.vocab = 999: .* 0 to 999; set model.vocab to 10"):
        load_config(smallest, [*text, "model.vocab=999"])
    assert load_config(smallest, ["data.kind=text"]).model.vocab == 320
    assert load_config(smallest).model.vocab == 320


def test_a_tokenizer_that_cannot_be_read_is_one_line(smallest: Path, tmp_path: Path) -> None:
    text = ["data.kind=text", "data.tokenizer=nowhere.json"]
    with pytest.raises(ConfigError, match=r'data\.tokenizer = "nowhere.json": cannot be read'):
        load_config(smallest, text)
    assert load_config(smallest, [*text, "model.vocab=500"]), "it may come later"
    other = tmp_path / "other.json"
    for content in ("{}", '{"model": {"vocab": 3}}', "[", '{"model": {"vocab": {"a": -1}}}'):
        other.write_text(content)
        with pytest.raises(ConfigError, match=r"other.json\": is no tokenizer \(.*allowed are"):
            load_config(smallest, ["data.kind=text", f"data.tokenizer={other}"])
