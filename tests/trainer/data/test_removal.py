"""Removed samples: nothing of them is left, and all others stay where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from holdfast.parallel.errors import ConfigError, DataError
from holdfast.trainer.config import Removal, check_config, convert_config
from holdfast.trainer.data import Dataset, open_dataset
from holdfast.trainer.data.dataset import NOTHING
from support.runs.small_runs import SMALL, make_config

BATCH = 4
KINDS: dict[str, dict[str, Any]] = {
    "synthetic": {"kind": "synthetic"},
    "windows": {},
    "documents": {"packing": "documents"},
    "best-fit": {"packing": "best-fit"},
    "mixture": {"weights": [0.7, 0.3]},
}


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Two files of lines in JSON, whose documents have very different lengths."""
    found = []
    for name, words in (("a", "the quick brown fox jumps"), ("b", "over a lazy dog again")):
        path = tmp_path / f"{name}.jsonl"
        lines = [f'{{"text": "{words} {"abc " * (number % 7)}"}}\n' for number in range(40)]
        path.write_text("".join(lines))
        found.append(str(path))
    return found


def opened(kind: str, texts: list[str], removals: list[Removal]) -> Dataset:
    keys = {"kind": "text", "path": texts, **KINDS[kind]}
    if keys["kind"] == "synthetic":
        keys.pop("path")
    data = convert_config({**SMALL, "data": keys}).data
    data = msgspec.structs.replace(data, without=removals)
    return open_dataset(data, vocab=257, seq_len=16, seed=1, before=lambda step: step * BATCH)


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_sample_is_empty_and_all_others_stay(kind: str, texts: list[str]) -> None:
    whole = opened(kind, texts, [])
    count = 3 * whole.size if whole.size < 1000 else 50
    numbers = whole.numbers(0, count)
    removed = numbers[5]
    rest = opened(kind, texts, [Removal(start=1, samples=[removed])])
    assert rest.numbers(0, count) == numbers
    assert rest.fingerprint == whole.fingerprint
    for index, number in enumerate(numbers):
        mine, all_ = rest.sample(index), whole.sample(index)
        if number != removed or index < BATCH:
            assert np.array_equal(mine.tokens, all_.tokens)
            assert np.array_equal(mine.targets, all_.targets)
            assert mine.lengths == all_.lengths
            continue
        assert not mine.tokens.any()
        assert (mine.targets == NOTHING).all()
        assert (mine.lengths is None) == (all_.lengths is None)
    for step in range(count // BATCH):
        batch = [rest.batch(step, m, global_batch=BATCH, micro_batch_size=2) for m in (0, 1)]
        told = sum(int((found.targets != NOTHING).sum()) for found in batch)
        assert rest.predicted(step, global_batch=BATCH) == told


@pytest.mark.parametrize("kind", ["windows", "documents", "best-fit"])
def test_every_epoch_has_each_number_once(kind: str, texts: list[str]) -> None:
    whole = opened(kind, texts, [])
    for epoch in (0, 1):
        found = whole.numbers(epoch * whole.size, whole.size)
        assert sorted(found) == list(range(whole.size))


def test_more_removals_add_to_those_before(texts: list[str]) -> None:
    whole = opened("windows", texts, [])
    first, second = whole.numbers(4, 2)
    both = opened("windows", texts, [Removal(samples=[first])]).without([(0, [second])])
    assert [both.sample(i).tokens.any() for i in (3, 4, 5, 6)] == [True, False, False, True]


def test_a_number_beyond_the_data_is_refused(texts: list[str]) -> None:
    with pytest.raises(DataError, match=r"data\.without names sample 99999: the data has"):
        opened("windows", texts, [Removal(samples=[99999])])
    with pytest.raises(ConfigError, match=r"data\.without\[0\]\.samples has -1: samples are"):
        check_config(make_config(data={"without": [{"samples": [-1]}]}), 1)
