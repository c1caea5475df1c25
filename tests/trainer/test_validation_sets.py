"""Named validation sets: their losses are those of a plain loop, in every layout, and by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.data_section import validation_data
from holdfast.trainer.config.loading import (
    check_config,
    convert_config,
    dump_toml,
    load_config,
)
from holdfast.trainer.config.places import anchored
from holdfast.trainer.step.evaluation import batches_of, evaluates_after, open_validation
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, fault
from support.runs.small_runs import make_config, metrics_of

SEQ_LEN = 16
POEM = ("Tyger Tyger, burning bright, In the forests of the night " * 3)[:128]
MODEL = {"layers": 2, "vocab": 257, "dropout": 0.0}
TRAIN = {"steps": 6, "seq_len": SEQ_LEN, "global_batch": 4, "eval_every": 2, "eval_batches": 3}


def sets_in(folder: Path) -> list[dict[str, Any]]:
    """One set of eight windows, and one of two: less than a global batch."""
    (folder / "poem.txt").write_text(POEM)
    (folder / "code.txt").write_text("for (;;) { x += 1; } // not prose at all ;;")
    return [
        {"name": "poem", "path": [str(folder / "poem.txt")], "kind": "text"},
        {"name": "code.c", "path": [str(folder / "code.txt")], "kind": "text"},
    ]


def config_with(sets: list[dict[str, Any]], **sections: Any) -> RunConfig:
    train = {**TRAIN, **sections.pop("train", {})}
    return make_config(model=MODEL, train=train, data={"validation": sets}, **sections)


def test_a_set_is_read_once_at_most_and_held_out_text_as_often_as_it_was(tmp_path: Path) -> None:
    config = config_with(sets_in(tmp_path))
    found = open_validation(config)
    assert list(found) == ["held_out", "poem", "code.c"]
    assert (found["poem"].size, found["code.c"].size) == (8, 2)
    assert [batches_of(config, name, data) for name, data in found.items()] == [3, 2, 1]
    assert [step for step in range(8) if evaluates_after(config, step)] == [0, 2, 4, 6]


def test_runs_of_any_seed_evaluate_on_the_same_sequences(tmp_path: Path) -> None:
    sets = sets_in(tmp_path)
    first, other = (
        open_validation(config_with(sets, train={"seed": seed}))["poem"].fingerprint
        for seed in (1, 2)
    )
    assert first == other


def test_a_set_is_read_as_the_run_s_text_is_unless_it_says_otherwise(tmp_path: Path) -> None:
    own = {"name": "own", "path": ["a.txt"]}
    other = {"name": "other", "path": ["b.txt"], "tokenizer": "t.json"}
    text = {"kind": "text", "path": ["c.txt"], "json_key": "content", "validation": [own, other]}
    data = convert_config({"model": {**MODEL, "family": "llama", "hidden": 32}, "data": text}).data
    first, second = (validation_data(data, one) for one in data.validation)
    assert (first.kind, first.tokenizer, first.json_key) == ("text", "bytes", "content")
    assert (second.tokenizer, second.eval_fraction, second.path) == ("t.json", 0.0, ["b.txt"])


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"name": "held_out", "path": ["a"]}, "'held_out' is what the run holds out"),
        ({"name": "a b", "path": ["a"]}, "at most 64 letters, digits"),
        ({"name": "a", "path": []}, "name the files of 'a'"),
        ({"name": "a", "path": ["a"], "kind": ""}, 'kind = "" with data.kind = "synthetic"'),
        ({"name": "a"}, "path"),
        ({"name": "a", "path": ["a\n"], "kind": "text"}, "control characters"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused(own: dict[str, Any], said: str) -> None:
    sections = {"model": {**MODEL, "family": "llama", "hidden": 32}}
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_config(convert_config({**sections, "data": {"validation": [own]}}))


def test_two_sets_of_one_name_are_refused() -> None:
    own = {"name": "a", "path": ["a"], "kind": "text"}
    with pytest.raises(ConfigError, match="the name of another set"):
        check_config(config_with([own, own]))


def test_sets_are_tables_with_one_path_or_many_and_are_anchored(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nfamily = "llama"\nlayers = 2\nhidden = 32\nvocab = 257\n'
        '[[data.validation]]\nname = "a"\nkind = "text"\npath = "a.txt"\n'
        '[[data.validation]]\nname = "b"\nkind = "text"\npath = ["b.txt", "c"]\n'
    )
    config = load_config(path, [])
    assert [own.path for own in config.data.validation] == [["a.txt"], ["b.txt", "c"]]
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(dump_toml(anchored(config)))
    again = load_config(resolved, [])
    assert again.data.validation[1].path == [str(Path.cwd() / name) for name in ("b.txt", "c")]
    assert again == anchored(again)


@pytest.mark.mp
def test_losses_have_the_same_bits_after_a_resume_and_when_a_rank_dies_before_an_evaluation(
    cluster: Cluster, start: Starter, tmp_path: Path
) -> None:
    sets = sets_in(tmp_path)
    for stop_after, known in ((3, sets[:1]), (0, sets)):  # the second set is named later
        config = config_with(known, train={"stop_after": stop_after}, log={"tensorboard": True})
        plain, root = msgspec.to_builtins(config), str(tmp_path / "alone")
        cluster.run("support.runs.small_runs:train_in", 1, config=plain, root=root)
    run = start(
        model=MODEL,
        train=TRAIN,
        data={"validation": sets},
        parallel={"data": 2},
        elastic={"chaos": [fault("kill", 0, 4, "apply")]},
    )
    assert run.finish() == 0, run.output()
    assert len(run.events("rank_lost")) == 1
    found = {line["step"]: line.get("validation_hex", {}) for line in run.steps()}
    alone = {line["step"]: line for line in metrics_of(tmp_path / "alone")}
    assert [step for step, losses in found.items() if losses] == [2, 4, 6]
    assert list(found[6]) == ["held_out", "poem", "code.c"]
    assert {step: alone[step]["validation_hex"] for step in (4, 6)} == {4: found[4], 6: found[6]}
    assert alone[2]["validation_hex"].items() < found[2].items()
    assert {n: float.fromhex(v) for n, v in found[6].items()} == run.steps()[5]["validation"]
    events = {(e["step"], e["set"]): e["loss_hex"] for e in run.events("evaluated")}
    assert events[6, "poem"] == found[6]["poem"]

    board = EventAccumulator(str(tmp_path / "alone" / "tensorboard"))
    board.Reload()
    shown = [scalar.step for scalar in board.Scalars("validation_metrics/loss/code.c")]
    assert shown == [4, 6]
