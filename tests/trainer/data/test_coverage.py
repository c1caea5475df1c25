"""How much data a run has is told before it begins, and what is told is what it then reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from holdfast.parallel.errors import DataError
from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.data import coverage_of, known_coverage, open_dataset
from holdfast.trainer.data.corpora.megatron import HEADER, MAGIC


def run_config(steps: int = 100, batch: int = 16, **data: object) -> RunConfig:
    return convert_config(
        {
            "model": {"family": "llama", "layers": 1, "hidden": 16, "vocab": 320},
            "train": {"steps": steps, "global_batch": batch, "seq_len": 16},
            "data": data,
        }
    )


@pytest.mark.parametrize("weights", [[], [3.0, 1.0]])
def test_text_is_counted_once_it_is_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[float]
) -> None:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text("some text of some length " * 40)
    data = {"kind": "text", "path": [str(path) for path in paths], "weights": weights}
    config = run_config(**data)
    before = known_coverage(config)
    assert (before.sequences, before.epochs) == (None, None)
    assert before.line() == (
        f"text of {paths[0]} and 1 more, tokenizer bytes: 2.0 KiB, not tokenised yet"
    )
    assert not (tmp_path / "cache").exists(), "a look makes nothing"
    opened = open_dataset(config.data, vocab=320, seq_len=16, seed=1)
    known = known_coverage(config)
    assert known == coverage_of(config, opened)
    assert known.sequences == opened.size > 100
    assert known.epochs == 100 * 16 / opened.size
    assert known.as_dict()["tokens"] == opened.size * 16
    assert f"tokens to train on, in {opened.size} sequences; 100 steps are" in known.line()
    assert "; up to 4, text teaches" in known.line()
    few = known_coverage(run_config(steps=1, **data)).line()
    assert few.endswith(f"1 steps are {16 / opened.size:.3g} epochs")
    assert "lower train.global_batch" in known_coverage(run_config(batch=1000, **data)).line()


def test_megatrons_files_are_counted_by_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "c.bin").write_bytes(np.zeros(1000, np.uint16).tobytes())
    head = HEADER.pack(MAGIC, 1, 8, 1, 2)
    (tmp_path / "c.idx").write_bytes(head + bytes(12 + 16))
    config = run_config(kind="megatron", path=[str(tmp_path / "c")])
    assert known_coverage(config).sequences == (1000 - 50 - 1) // 16
    with pytest.raises(DataError, match="does not exist"):
        known_coverage(run_config(kind="megatron", path=["nowhere"]))


def test_synthetic_data_is_called_so_and_has_no_epochs() -> None:
    config = run_config()
    opened = open_dataset(config.data, vocab=320, seq_len=16, seed=1)
    assert known_coverage(config) == coverage_of(config, opened)
    assert known_coverage(config).line() == "synthetic, a Markov chain without end"
