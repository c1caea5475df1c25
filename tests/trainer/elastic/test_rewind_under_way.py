"""A run under way takes steps back from memory as a person asks, and loses a rank afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.trainer.config import Removal, load_config
from support.processes.cluster import Cluster
from support.runs.commands import holdfast
from support.runs.elastic_runs import Starter, bits_of, pace
from support.runs.small_runs import make_config, run_training

BATCH = 6
SECTIONS: dict[str, Any] = {"model": {"layers": 2}, "train": {"steps": 16, "global_batch": BATCH}}
LATE = 12
"""The step, counted from 0, that reads the sample."""


@pytest.mark.mp
def test_steps_are_taken_back_under_way_and_survive_the_loss_of_a_rank(
    start: Starter, cluster: Cluster
) -> None:
    number = LATE * BATCH + 3
    never = make_config(**SECTIONS, data={"without": [{"samples": [number]}]})
    expected = bits_of(run_training(cluster, never))

    elastic = pace({"rewind": 3, "verify_every": 2}, 0.25)
    run = start(**SECTIONS, parallel={"data": 2}, checkpoint={"every": 2}, elastic=elastic)
    run.wait_for_step(5)
    folder = run.root.parent
    refused = holdfast(folder, "rewind", run.root.name, "--steps", "9")
    assert refused.returncode == 2
    assert "is under way with elastic.rewind = 3" in refused.stderr
    asked = holdfast(folder, "rewind", run.root.name, "--steps", "2", "--without", str(number))
    assert asked.returncode == 0, asked.stderr + run.output()
    (event,) = run.events("rewound")
    back = event["step"]
    assert event["samples"] == [number]
    assert f"as asked, the run goes back from step {back + 2} to step {back} and on" in asked.stdout
    assert load_config(run.root / "config.toml", []).data.without == [
        Removal(start=back, samples=[number])
    ]
    run.kill(1)
    assert run.finish() == 0, run.output()
    assert back < LATE
    assert run.events("rank_lost")
    assert not run.events("corruption")
    assert run.bits() == expected
