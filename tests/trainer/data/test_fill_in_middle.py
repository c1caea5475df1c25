"""Documents with their middle at the end: the paper's form, restored to the text, by key alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from holdfast.parallel.errors import DataError
from holdfast.trainer.config import DataConfig, check_data_config
from holdfast.trainer.data import open_dataset
from holdfast.trainer.data.fill_in_middle import Draws, FillInMiddle, fill_in_middle
from holdfast.trainer.data.opening import open_samples

NAMES = ["<PRE>", "<SUF>", "<MID>"]
TEXTS = [
    f"def f{n}(caf\u00e9):\n    return '\u4f60\u597d \U0001f525' * {n}\n" * 2 for n in range(12)
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Text of short documents, with a byte-level tokenizer that has merges."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: Any = {"vocab_size": 300, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(**settings))
    tokenizer.add_special_tokens([AddedToken(name) for name in ("</s>", *NAMES)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    return DataConfig(
        kind="text",
        path=[str(tmp_path / "texts")],
        tokenizer=str(tmp_path / "tokenizer.json"),
        fim_rate=0.7,
        fim_tokens=NAMES,
    )


def with_keys(data: DataConfig, **keys: Any) -> DataConfig:
    return DataConfig(**{name: getattr(data, name) for name in data.__struct_fields__} | keys)


def papers_form(text: str, draws: Draws, spm: bool) -> str:
    """The transformation as the paper writes it, of text, with names for tokens."""
    low, high = sorted(int(draw * (len(text) + 1)) for draw in (draws.first, draws.second))
    prefix, middle, suffix = text[:low], text[low:high], text[high:]
    if spm:
        return f"<PRE><SUF>{suffix}<MID>{prefix}{middle}"
    return f"<PRE>{prefix}<SUF>{suffix}<MID>{middle}"


def restored(text: str) -> str:
    """The text that a changed document was made of."""
    before, _, rest = text.removeprefix("<PRE>").partition("<SUF>")
    after, _, middle = rest.partition("<MID>")
    return middle + after if not before else before + middle + after


def test_a_document_has_the_form_of_the_paper_and_gives_its_text_back(data: DataConfig) -> None:
    rule = fill_in_middle(data)
    rng = np.random.default_rng(0)
    for text in TEXTS:
        ids = rule.tokenizer.encode([text.encode()])[0]
        for spm in (False, True):
            draws = Draws(0.0, 0.0 if spm else 0.9, *rng.random(2).tolist())
            for end in ([], [rule.tokenizer.separator]):
                found = rule.changed(np.array([*ids, *end], dtype=np.int64), draws)
                made = rule.tokenizer.text(found.tolist())
                assert made == papers_form(text, draws, spm) + ("</s>" if end else "")
                assert restored(made.removesuffix("</s>")) == text
    short = np.arange(5)
    assert rule.changed(short, Draws(0.7, 0.0, 0.2, 0.8)) is short, (
        "a rate of 0.7 changes seven of ten"
    )


def test_what_is_not_whole_text_is_cut_between_tokens(data: DataConfig) -> None:
    rule = fill_in_middle(data)
    ids = rule.tokenizer.encode(["\u4f60\u597d".encode()])[0]
    body = np.concatenate([ids[1:], ids[:1]])  # it begins within a character
    parts = rule.parts(body, Draws(0.0, 0.0, 0.3, 0.7))
    assert np.concatenate(parts).tolist() == body.tolist()
    assert rule.parts(body[:0], Draws(0.0, 0.0, 0.3, 0.7)) == ([], [], [])


def test_windows_hold_changed_documents_one_after_the_other(data: DataConfig) -> None:
    changed: Any = open_samples(data, vocab=320, seq_len=48, seed=5, split="train")
    plain: Any = open_samples(
        with_keys(data, fim_rate=0.0, fim_tokens=[]), vocab=320, seq_len=48, seed=5, split="train"
    )
    rule: FillInMiddle = changed.rule
    counts = [0, 0, 0]
    for index in range(3 * changed.size):
        [row] = plain.sequences(index, 1).tokens
        window = np.append(row, plain.sequences(index, 1).targets[0, -1])
        ends = [
            place + 1 for place, token in enumerate(window) if token == rule.tokenizer.separator
        ]
        documents = [d for d in np.split(window, ends) if len(d)]
        draws = changed.draws(index, len(documents))
        expected = [rule.changed(d, own) for d, own in zip(documents, draws, strict=True)]
        found = changed.sequences(index, 1)
        whole = np.concatenate(expected)[:49]
        assert found.tokens[0].tolist() == whole[:-1].tolist()
        assert found.targets[0].tolist() == whole[1:].tolist()
        for own in draws:
            counts[2 if own.changed >= 0.7 else int(own.order < 0.5)] += 1
    total = sum(counts)
    for count, share in zip(counts, (0.35, 0.35, 0.3), strict=True):
        assert abs(count / total - share) < 5 * (share * (1 - share) / total) ** 0.5
    assert changed.predicted(0, 7) == 7 * 48
    assert changed.fingerprint != plain.fingerprint


def test_samples_are_functions_of_seed_and_number_and_each_epoch_has_its_own(
    data: DataConfig,
) -> None:
    one, other = (open_dataset(data, vocab=320, seq_len=40, seed=3) for _ in range(2))
    batch = one.batch(2, 0, global_batch=6, micro_batch_size=6)
    for row in reversed(range(6)):
        part = other.batch(2, row, global_batch=6, micro_batch_size=1)
        assert part.tokens.equal(batch.tokens[row : row + 1])
        assert part.targets.equal(batch.targets[row : row + 1])
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != open_dataset(data, vocab=320, seq_len=40, seed=4).fingerprint
    epochs = [
        {tuple(one.sample(epoch * one.size + i).tokens[0].tolist()) for i in range(one.size)}
        for epoch in (0, 1)
    ]
    assert epochs[0] != epochs[1]
    held_out = open_dataset(data, vocab=320, seq_len=40, seed=3, split="eval")
    special = set(fill_in_middle(data).tokens)
    assert not special & set(held_out.sample(0).tokens.ravel().tolist()), "it is left as it is"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fim_rate": 1.5}, "data.fim_rate = 1.5: allowed are 0 to 1"),
        ({"fim_spm_rate": -1.0}, "data.fim_spm_rate = -1.0: allowed are 0 to 1"),
        ({"fim_rate": 0.0}, "it would not be used; set data.fim_rate"),
        ({"tokenizer": "bytes"}, "a tokenizer.json that has them"),
        ({"packing": "documents"}, 'set data.packing = "concatenated"'),
        ({"fim_tokens": ["a", "b"]}, "name three tokens of the tokenizer"),
        ({"fim_tokens": ["a", "b", "a"]}, "name three tokens of the tokenizer"),
    ],
)
def test_what_cannot_be_done_is_refused(data: DataConfig, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        check_data_config(with_keys(data, **keys))
    assert said in str(caught.value)


def test_a_token_that_the_tokenizer_lacks_is_named(data: DataConfig) -> None:
    with pytest.raises(DataError, match="has no token '<MIDDLE>'"):
        fill_in_middle(with_keys(data, fim_tokens=["<PRE>", "<SUF>", "<MIDDLE>"]))
