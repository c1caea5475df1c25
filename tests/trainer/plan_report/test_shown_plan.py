"""A plan, as a person reads it, shows what was chosen and has no number without a unit."""

from __future__ import annotations

import io

from rich.console import Console

from holdfast.trainer.data import known_coverage
from holdfast.trainer.plan_report import plan_report
from support.runs.small_runs import make_config


def shown(**sections: dict) -> str:
    config = make_config(**sections)
    report = plan_report(config, data=known_coverage(config))
    screen = io.StringIO()
    Console(file=screen, width=160).print(report.renderable(160))
    return screen.getvalue()


def test_a_plan_names_model_data_and_checkpoint() -> None:
    text = shown()
    assert (
        "llama: 6 layers, hidden 32, 4 heads of 8 (2 for keys and values), MLP 48, vocabulary 67"
        in text
    )
    assert "synthetic, a Markov chain without end" in text
    assert "1f1b, 1 chunk per rank" in text
    assert "KiB; the rank that writes most" in text
    assert "makespan" not in text


def test_a_plan_says_what_chunks_of_the_vocabulary_save() -> None:
    large = {"vocab": 131072}
    train = {"seq_len": 1024, "global_batch": 4, "micro_batch": 1}
    whole = " ".join(shown(model=large, train=train).split())
    assert "logits train.vocab_chunk = 8192 would keep 480.0 MiB less for each micro-batch" in whole
    chunked = " ".join(shown(model=large, train={**train, "vocab_chunk": 8192}).split())
    assert "logits by chunks of 8192 vocabulary entries: 480.0 MiB less for each" in chunked
    assert "the logits (" in chunked
    assert "logits" not in shown()  # small ones are nobody's question


def test_a_chart_has_a_legend_of_the_letters_in_it() -> None:
    plain = " ".join(shown().split())
    assert "F forward, B backward; F3 is of micro-batch 3; small letters" in plain
    assert "chunk 1" not in plain + " ".join(shown(parallel={"pipeline": 2}).split())
    stretches = {"train": {"context_chunks": 2}, "parallel": {"pipeline": 2, "stretches": 2}}
    text = " ".join(shown(**stretches).split())
    assert "1f1b, 1 chunk per rank, sequences in 2 stretches" in text
    assert "F3 is of micro-batch 3; F3.2 of its stretch 2; small letters" in text
    assert "peak: stretches whose activations" in text
    split = {"pipeline": 2, "virtual": 2, "schedule": "zb-v"}
    chunks = " ".join(shown(parallel=split, model={"layers": 8}).split())
    assert "I backward of the inputs, W backward of the weights; F3" in chunks
    assert "; 1F3 is of chunk 1; small letters" in chunks
