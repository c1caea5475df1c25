"""A batch that grows: steps, samples and bits are those of one process, whatever happens."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.plan.initial import micro_batch_counts, split_micro_batches
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.loading import check_config
from holdfast.trainer.config.sections import BatchStage, TrainConfig
from holdfast.trainer.step.planning import plan_of
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault, pace
from support.runs.small_runs import events_of, make_config, metrics_of, run_training

MODEL = {"layers": 4}
TRAIN: dict[str, Any] = {
    "steps": 9,
    "global_batch": 12,
    "batch_ramp": [{"until": 3, "global_batch": 4}, {"until": 6, "global_batch": 8}],
}
SIZES = [4, 4, 4, 8, 8, 8, 12, 12, 12]


@given(
    ramp=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), max_size=4),
    batch=st.integers(7, 9),
)
def test_samples_before_a_step_are_those_of_the_steps_before(
    ramp: list[tuple[int, int]], batch: int
) -> None:
    ends = accumulate(length for length, _ in ramp)
    stages = [
        BatchStage(until=end, global_batch=size) for end, (_, size) in zip(ends, ramp, strict=True)
    ]
    train = TrainConfig(global_batch=batch, batch_ramp=stages)
    sizes = [size for length, size in ramp for _ in range(length)] + [batch] * 9
    for step, before in enumerate(accumulate(sizes, initial=0)):
        assert train.samples_before(step) == before
        assert step == len(sizes) or train.batch_of(step) == sizes[step]


@given(count=st.integers(1, 60), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_of_the_first_micro_batches_each_replica_is_dealt_its_share(
    count: int, sizes: list[int]
) -> None:
    counts = micro_batch_counts(count, sizes)
    hands = split_micro_batches(count, sizes, "dealt")
    assert [len(hand) for hand in hands] == counts
    assert sorted(number for hand in hands for number in hand) == list(range(count))
    for first in range(count + 1):
        for own, hand in zip(counts, hands, strict=True):
            assert abs(sum(number < first for number in hand) - first * own / count) < len(sizes)


def test_replicas_share_the_micro_batches_of_a_small_batch() -> None:
    plan = plan_of(config_of(parallel={"data": 4}))
    assert [len([n for n in own if n < 4]) for own in plan.micro_batches] == [1, 1, 1, 1]
    plain = plan_of(make_config(train={**TRAIN, "batch_ramp": []}, parallel={"data": 4}))
    assert plain.micro_batches[0] == (0, 1, 2)


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        ([(3, 4), (3, 8)], "must be more than 3"),
        ([(3, 16)], "at most train.global_batch = 12"),
        ([(3, 3)], "multiple of train.micro_batch x parallel.data = 2"),
        ([(0, 4)], "until"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(ramp: list[tuple[int, int]], said: str) -> None:
    stages = [{"until": until, "global_batch": size} for until, size in ramp]
    with pytest.raises(ConfigError, match=said):
        check_config(config_of(train={"batch_ramp": stages}, parallel={"data": 2}))


def config_of(**sections: Any) -> RunConfig:
    return make_config(model=MODEL, train={**TRAIN, **sections.pop("train", {})}, **sections)


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    return run_training(cluster, config_of())


@pytest.mark.mp
@pytest.mark.parametrize(
    "layout",
    [
        {"data": 4},
        {"data": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v"},
        {"data": 2, "micro_batch_order": "shuffled"},
        {"data": 4, "shard": "parameters", "shard_group": 2},
        {"data": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v", "shard": "gradients"},
        {"data": 2, "micro_batch_order": "shuffled", "schedule": "gpipe", "shard": "parameters"},
    ],
    ids=str,
)
def test_layouts_give_the_bits_of_one_process(
    cluster: Cluster, expected: dict[str, Any], layout: dict[str, Any]
) -> None:
    assert run_training(cluster, config_of(parallel=layout)) == expected


@pytest.mark.mp
def test_a_run_goes_on_within_the_ramp_and_counts_its_tokens(
    cluster: Cluster, expected: dict[str, Any], tmp_path: Path
) -> None:
    for stop_after, ranks in ((2, 1), (6, 2), (0, 1)):
        config = config_of(train={"stop_after": stop_after}, parallel={"data": ranks})
        plain = msgspec.to_builtins(config)
        cluster.run("support.runs.small_runs:train_in", ranks, config=plain, root=str(tmp_path))
    lines = metrics_of(tmp_path)
    assert [line["loss_hex"] for line in lines] == expected["losses"]
    assert [line["tokens"] for line in lines] == [16 * n for n in accumulate(SIZES)]
    (finished,) = events_of(tmp_path, "run_finished")
    assert finished["parameter_digest"] == expected["digest"]


@pytest.mark.mp
@pytest.mark.parametrize("shard", ["optimizer", "parameters"])
def test_ranks_that_die_within_the_ramp_and_their_replacements_change_no_bit(
    start: Starter, expected: dict[str, Any], shard: str
) -> None:
    run = start(
        model=MODEL,
        train=TRAIN,
        parallel={"data": 2, "pipeline": 2, "shard": shard},
        elastic=pace(
            {
                "verify_every": 1,
                "chaos": [fault("kill", 3, 2, "reduce"), fault("kill", 1, 6, "vote")],
            },
            0.2,
        ),
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == bits_of(expected)
    assert len(run.events("rank_lost")) == 2
