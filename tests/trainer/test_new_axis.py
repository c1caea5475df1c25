"""An axis that computes nothing is one entry of the table, and a run with it has the same bits.

Its ranks repeat each other: stage replicas have twice the ranks, and all else stays. It takes the
place, and so the key, of an axis that this version has no computation for.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from rich.console import Console
from torch.distributed import Store

from holdfast.parallel.layout import AXES, Axis
from holdfast.trainer.check.capture import RankCapture
from holdfast.trainer.check.compare import compare
from holdfast.trainer.check.reference import run_reference
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.rules import problems_of
from holdfast.trainer.plan_report.report import PlanReport, plan_report
from support.processes.cluster import Cluster
from support.runs import small_runs
from support.runs.elastic_runs import Starter, bits_of, fault
from support.runs.layouts import tiny
from support.runs.small_runs import events_of, make_config, metrics_of, run_training, world_size_of

REPEATS = Axis("context", "nothing: its ranks repeat each other", True, splits_work=False)
MESH = {"tensor": 2, "context": 2, "data": 2, "pipeline": 2}
WITHOUT = {"tensor": 2}
SECTIONS: dict[str, Any] = {"model": {"layers": 2}, "train": {"steps": 4, "global_batch": 4}}


def registered(axis: Axis = REPEATS) -> Any:
    """The registry's line."""
    return mock.patch.dict(AXES, context=axis)  # pyrefly: ignore


def config_of(layout: dict[str, int], **sections: dict[str, Any]) -> RunConfig:
    return make_config(**{**SECTIONS, **sections}, parallel=layout)


# In a worker's process.


def train_and_compare(rank: int, world_size: int, store: Store, *, config: dict) -> dict[str, Any]:
    """What `train_steps` gives, and a digest of this rank's own parameters."""
    from holdfast.trainer.step.training import Training

    seen: list[Training] = []
    digest = Training.parameter_digest

    def and_keep(self: Training) -> str:
        seen.append(self)
        return digest(self)

    with registered(), mock.patch.object(Training, "parameter_digest", and_keep):
        found = small_runs.train_steps(rank, world_size, store, config=config)
    training = seen[0]
    held = hashlib.sha256(training.parameter_buffer.values.numpy().tobytes()).hexdigest()
    return {**found, "held": held, "shards": training.groups.shards.size}


def train_in(rank: int, world_size: int, store: Store, **arguments: Any) -> None:
    with registered():
        small_runs.train_in(rank, world_size, store, **arguments)


def check_layout(
    rank: int, world_size: int, store: Store, *, config: dict, splits_work: bool
) -> RankCapture:
    with registered(replace(REPEATS, splits_work=splits_work)):
        return small_runs.check_layout(rank, world_size, store, config=config)


# The tests.


def test_a_configuration_with_the_axis_is_sound() -> None:
    with registered():
        config = config_of(MESH)
        assert problems_of(config, 16) == []
        assert problems_of(config, 8) == [
            "8 workers were started, but tensor 2 x context 2 x pipeline 2 x data 2 needs 16; "
            "change parallel.data, or start 16"
        ]


def report_of(layout: dict[str, int], lost: tuple[int, ...] = ()) -> PlanReport:
    return plan_report(
        config_of(layout, train={"steps": 4, "global_batch": 4, "tflops": 1.0}),
        link_bytes_per_s=1e9,
        lost=lost,
    )


def test_the_plan_report_names_the_axis_and_divides_nothing_by_it() -> None:
    with registered():
        found, lossy = report_of(MESH), report_of(MESH, lost=(5,))
    without = report_of({**MESH, "context": 1})
    facts, expected = found.as_dict(), without.as_dict()
    assert facts["mesh"] == MESH
    assert "context" not in expected["mesh"]
    for fact in ("parameters", "step_flops", "bubble", "step_s", "memory_by_stage", "chunks"):
        assert facts[fact] == expected[fact], fact
    assert lossy.elastic is not None
    assert lossy.elastic.as_dict()["lost"]["spares"] == [4, 6, 7]
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(lossy.renderable())
    shown = capture.get()
    assert "tensor 2 x context 2 x pipeline 2 x data 2 = 16" in shown
    assert "ranks 4-7" in shown  # a stage replica in the table of the layout
    assert "ranks 12-15" in shown


@pytest.mark.mp
def test_training_with_the_axis_gives_the_same_bits(cluster: Cluster) -> None:
    expected = run_training(cluster, config_of(WITHOUT))
    found = cluster.run(
        "test_new_axis:train_and_compare", 16, config=msgspec.to_builtins(config_of(MESH))
    )
    held = [result.pop("held") for result in found]
    assert [result.pop("shards") for result in found] == [4] * 16
    assert found == [expected] * 16
    for first in range(0, 16, 4):
        assert held[first : first + 2] == held[first + 2 : first + 4]  # what is not in the digest


@pytest.mark.mp
def test_check_agrees_and_names_the_axis_where_its_entry_is_wrong(cluster: Cluster) -> None:
    config = tiny(MESH, {}, steps=2)
    alone = msgspec.structs.replace(config, parallel=type(config.parallel)())
    plain, reference = msgspec.to_builtins(config), run_reference(alone)

    def findings(*, splits_work: bool) -> list[str]:
        ranks = cluster.run("test_new_axis:check_layout", 16, config=plain, splits_work=splits_work)
        return [str(finding) for finding in compare(ranks, reference)]

    assert findings(splits_work=False) == []
    first, *_ = findings(splits_work=True)
    assert first.startswith("gradient ")
    assert "summed over the context group, where each copy already has all of it" in first


@pytest.mark.mp
@pytest.mark.parametrize("saved_with", [True, False], ids=["saved-with", "loaded-with"])
def test_a_checkpoint_does_not_know_the_axis(
    cluster: Cluster, tmp_path: Path, saved_with: bool
) -> None:
    expected = run_training(cluster, config_of(WITHOUT))
    layouts = [MESH, WITHOUT] if saved_with else [WITHOUT, MESH]
    for layout, stop in zip(layouts, (2, 0), strict=True):
        train = {**SECTIONS["train"], "stop_after": stop}
        config = config_of(layout, train=train, log={"tensorboard": False})
        cluster.run(
            "test_new_axis:train_in",
            world_size_of(config),
            config=msgspec.to_builtins(config),
            root=str(tmp_path),
        )
    lines = metrics_of(tmp_path)
    assert [line["world"] for line in lines] == [
        world_size_of(config_of(layout)) for layout in layouts for _ in range(2)
    ]
    assert [line["loss_hex"] for line in lines] == expected["losses"]
    assert [line["grad_norm_hex"] for line in lines] == expected["norms"]
    ends = [event["parameter_digest"] for event in events_of(tmp_path, "run_finished")]
    assert ends[-1] == expected["digest"]


def register() -> None:
    """Called in the process of a command, from which it forks all others."""
    registered().start()


@pytest.mark.mp
@pytest.mark.chaos
def test_a_loss_with_the_axis_changes_no_bit(cluster: Cluster, start: Starter) -> None:
    train = {"steps": 5, "global_batch": 4}
    expected = bits_of(run_training(cluster, config_of(WITHOUT, train=train)))
    start.before = "test_new_axis:register"
    run = start(
        model=SECTIONS["model"],
        train=train,
        parallel={"tensor": 2, "context": 2, "data": 2},
        elastic={"respawn": False, "chaos": [fault("kill", 6, 4, "reduce")]},
    )
    assert run.finish() == 0, run.output()
    assert run.bits() == expected
    (recovered,) = run.events("recovered")
    assert recovered["plan"]["stages"] == [[[0, 1, 2, 3]]]
    assert recovered["plan"]["spares"] == [4, 5, 7]
