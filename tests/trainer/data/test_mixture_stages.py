"""Mixtures whose shares change at steps: samples stay a function of their number, none is lost."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from holdfast.parallel.errors import ConfigError, DataError
from holdfast.trainer.config import DataConfig, RunConfig
from holdfast.trainer.config.data_section import MixtureStage, check_data_config
from holdfast.trainer.data import coverage_of
from holdfast.trainer.data.mixture import mixture_samples, staged_samples
from holdfast.trainer.data.synthetic import markov_samples
from holdfast.trainer.run.resume import find_resume
from holdfast.trainer.step.construction import open_split
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault
from support.runs.sequences import windows_of
from support.runs.small_runs import events_of, make_config, metrics_of, run_training

SOURCES = tuple(markov_samples(vocab=20, seq_len=4, seed=n, split="train") for n in range(3))
SHARES = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0]), min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    stages=st.lists(st.tuples(st.integers(1, 80), SHARES.filter(any)), min_size=1, max_size=5),
    place=st.integers(0, 300),
)
def test_every_corpus_goes_on_where_it_was_and_each_stage_keeps_its_shares(
    stages: list[tuple[int, list[float]]], place: int
) -> None:
    firsts = np.cumsum([0, *(length for length, _ in stages)])[:-1].tolist()
    weights = [own for _, own in stages]
    mixed = staged_samples(SOURCES, list(zip(firsts, weights, strict=True)))
    taken = [0, 0, 0]
    in_stage: list[int] = []
    for index in range(300):
        if index in firsts:
            in_stage = [0, 0, 0]
        stage = max(n for n, first in enumerate(firsts) if first <= index)
        assert mixed.taken(index) == tuple(taken)
        source, own = mixed.locate(index)
        assert own == taken[source], "no sample of a corpus is left out or read twice"
        taken[source] += 1
        in_stage[source] += 1
        total = sum(map(Fraction, map(repr, weights[stage])))
        for number, weight in enumerate(weights[stage]):
            share = Fraction(repr(weight)) / total
            assert abs(in_stage[number] - share * (index + 1 - firsts[stage])) < 1
    again = staged_samples(SOURCES, list(zip(firsts, weights, strict=True)))
    assert np.array_equal(
        windows_of(mixed.sequences(place, 9)),
        np.concatenate([windows_of(again.sequences(place + row, 1)) for row in range(9)]),
    )


def test_one_stage_is_the_mixture_that_it_says() -> None:
    plain, staged = mixture_samples(SOURCES, [1, 2, 3]), staged_samples(SOURCES, [(0, [1, 2, 3])])
    assert [plain.locate(n) for n in range(50)] == [staged.locate(n) for n in range(50)]
    assert staged.size == plain.size
    other = staged_samples(SOURCES, [(0, [1, 2, 3]), (40, [1, 1, 1])])
    assert len({staged.fingerprint, other.fingerprint, plain.fingerprint}) == 3
    assert staged.predicted(3, 20) == plain.predicted(3, 20) == 80


def test_a_weight_that_is_never_drawn_is_told_with_its_stage() -> None:
    with pytest.raises(DataError, match=r"data\.stages\[0\]\.weights\[2\] = 1e-09"):
        staged_samples(SOURCES, [(0, [1, 1, 1]), (8, [1.0, 1.0, 1e-9])])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"weights": [], "stages": [(4, [1.0, 1.0])]}, "data.stages without data.weights"),
        ({"stages": [(4, [1.0])]}, "1 values and data.path has 2"),
        ({"stages": [(4, [1.0, 1.0]), (4, [2.0, 1.0])]}, "must be more than 4"),
        ({"stages": [(4, [0.0, 0.0])]}, "one of them must be above 0"),
        ({"stages": [(4, [-1.0, 1.0])]}, "positive number"),
        ({"weights": [1.0, 0.0], "stages": [(4, [2.0, 0.0])]}, "has the weight 0 at all steps"),
        ({"weights": [1.0, 0.0], "stages": []}, "leave the path out"),
    ],
)
def test_stages_that_say_nothing_sound_are_refused(keys: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"weights": [1.0, 1.0], "stages": [], **keys}
    stages = [MixtureStage(start=start, weights=weights) for start, weights in given["stages"]]
    data = DataConfig(kind="text", path=["a", "b"], weights=given["weights"], stages=stages)
    with pytest.raises(DataError, match=said):
        check_data_config(data)


def test_a_corpus_may_come_later() -> None:
    stage = MixtureStage(start=4, weights=[1.0, 1.0])
    check_data_config(DataConfig(kind="text", path=["a", "b"], weights=[1.0, 0.0], stages=[stage]))


def staged_run(folder: Path, **sections: Any) -> RunConfig:
    """Three corpora of one letter each: from step 3 on other shares, and no "a" from step 6 on."""
    for letter in "abc":
        (folder / f"{letter}.txt").write_text(letter * 700)
    return make_config(
        model={"layers": 2, "vocab": 257},
        data={
            "kind": "text",
            "path": [str(folder / f"{letter}.txt") for letter in "abc"],
            "weights": [1.0, 1.0, 0.0],
            "stages": [
                {"start": 3, "weights": [0.25, 0.25, 0.5]},
                {"start": 6, "weights": [0.0, 0.0, 1.0]},
            ],
        },
        train={"steps": 8, "global_batch": 4, **sections.pop("train", {})},
        **sections,
    )


def replaced(config: RunConfig, data: DataConfig) -> RunConfig:
    return msgspec.structs.replace(config, data=data)


def test_steps_have_the_samples_of_their_stage(tmp_path: Path) -> None:
    config = staged_run(tmp_path)
    data = open_split(config, "train")
    letters = [
        Counter(chr(int(data.sample(4 * step + row).tokens[0, 0])) for row in range(4))
        for step in range(8)
    ]
    before, then, last = {"a": 2, "b": 2}, {"a": 1, "b": 1, "c": 2}, {"c": 4}
    assert letters == [before] * 3 + [then] * 3 + [last] * 2
    coverage = coverage_of(config, data)
    sizes = [size for size, _ in data.corpora_taken(32)]
    taken = dict(zip("abc", (9, 9, 14), strict=True))
    assert coverage.by_path == tuple(
        (str(tmp_path / f"{letter}.txt"), count / size)
        for (letter, count), size in zip(taken.items(), sizes, strict=True)
    )
    assert f"({9 / sizes[0]:.3g} of {tmp_path}/a.txt, " in coverage.line()
    assert coverage.as_dict()["epochs_by_path"][str(tmp_path / "c.txt")] == 14 / sizes[2]
    held_out = open_split(config, "eval")
    read = Counter(chr(int(held_out.sample(row).tokens[0, 0])) for row in range(40))
    assert read == {"a": 20, "b": 20}


@pytest.mark.mp
def test_stages_have_the_bits_of_one_process_when_a_rank_dies_and_when_a_run_goes_on(
    cluster: Cluster, start: Starter, tmp_path: Path
) -> None:
    expected = bits_of(run_training(cluster, staged_run(tmp_path)))
    root = tmp_path / "resumed"
    for stop_after, ranks in ((4, 1), (0, 2)):
        config = staged_run(
            tmp_path, train={"stop_after": stop_after}, parallel={"pipeline": ranks}
        )
        plain = msgspec.to_builtins(config)
        cluster.run("support.runs.small_runs:train_in", ranks, config=plain, root=str(root))
    lines = metrics_of(root)
    steps = [(line["step"], line["loss_hex"], line["grad_norm_hex"]) for line in lines]
    digest = [event["parameter_digest"] for event in events_of(root, "run_finished")]
    assert {"steps": steps, "digest": digest} == expected
    plain = msgspec.to_builtins(staged_run(tmp_path))
    run = start(
        model=plain["model"],
        data=plain["data"],
        train={"steps": 8, "global_batch": 4},
        parallel={"data": 2},
        elastic={"chaos": [fault("kill", 1, 4, "backward")]},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    later = replaced(config, msgspec.structs.replace(config.data, stages=config.data.stages[:1]))
    with pytest.raises(ConfigError, match=r"--allow-change data\.stages"):
        find_resume(root, later, "auto")
