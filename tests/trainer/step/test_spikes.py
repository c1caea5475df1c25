"""The loss-spike guard: what stands out from the steps before is left out, on every rank alike."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from holdfast.parallel.errors import CheckpointError, Diverged
from holdfast.trainer.config.sections import NumericsConfig
from holdfast.trainer.loop import end_divergence, refuse
from holdfast.trainer.saves.checkpoint_loading import recent_from_data, recent_to_data
from holdfast.trainer.step.vote.progress import Outcome, RecentSteps, StepProgress
from holdfast.trainer.step.vote.spikes import judged
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, bits_of, fault, pace
from support.runs.small_runs import events_of, make_config, metrics_of, run_training

CALM = Outcome(loss=2.0, grad_norm=1.0, nonfinite_ranks=0, out_of_range_ranks=0)
GUARD = {"spike_window": 6, "spike_sigmas": 0.5, "spike_limit": 0}
"""So narrow that a run without spikes has many."""


def decided(outcomes: list[Outcome], numerics: NumericsConfig) -> tuple[list[bool], RecentSteps]:
    """Which of these steps are left out, and what is remembered after them."""
    progress, spikes = StepProgress(), []
    for step, outcome in enumerate(outcomes):
        found = judged(outcome, progress.recent, numerics)
        progress.decide(step + 1, found, numerics.spike_window)
        spikes.append(bool(found.spike))
    return spikes, progress.recent


def outcomes_of(losses: Any, norms: Any) -> list[Outcome]:
    pairs = zip(losses, norms, strict=True)
    return [replace(CALM, loss=float(loss), grad_norm=float(norm)) for loss, norm in pairs]


@pytest.mark.parametrize("window", [4, 7, 64])
@pytest.mark.parametrize("sigmas", [1.0, 2.5])
def test_what_is_left_out_is_what_mean_and_deviation_of_the_window_say(
    window: int, sigmas: float
) -> None:
    random = np.random.default_rng(window)
    losses, norms = random.normal(5, 1, 300), random.lognormal(0, 1, 300)
    numerics = NumericsConfig(spike_window=window, spike_sigmas=sigmas)
    spikes, recent = decided(outcomes_of(losses, norms), numerics)
    expected = []
    for step in range(300):
        z = [
            (values[step] - before.mean()) / before.std(ddof=1)
            for values in (losses, norms)
            if len(before := values[max(0, step - window) : step]) >= max(2, window // 2)
        ]
        expected.append(max(z, default=0.0) > sigmas)
    assert spikes == expected
    assert 2 <= sum(spikes) < 150
    assert recent.losses == tuple(losses[-window:])
    assert recent.grad_norms == tuple(norms[-window:])


def test_without_a_guard_nothing_is_left_out_and_nothing_remembered() -> None:
    outcomes = outcomes_of([1.0] * 20 + [1e9], [1.0] * 21)
    assert decided(outcomes, NumericsConfig()) == ([False] * 21, RecentSteps())


def test_less_than_the_mean_is_no_spike() -> None:
    outcomes = outcomes_of([5, 6, 5, 6, 0], [5, 6, 5, 6, 0.1])
    assert not any(decided(outcomes, NumericsConfig(spike_window=4))[0])


def test_steps_that_are_not_finite_are_neither_judged_nor_remembered() -> None:
    numerics = NumericsConfig(spike_window=4, nonfinite="skip")
    calm = outcomes_of([5, 6, 5, 6], [1, 2, 1, 2])
    wrong = replace(CALM, loss=math.inf, grad_norm=math.nan, nonfinite_ranks=1)
    spikes, recent = decided([*calm, wrong], numerics)
    assert not any(spikes)
    assert recent.losses == (5, 6, 5, 6)


def test_the_reason_says_what_stands_out_and_from_what() -> None:
    config = make_config(numerics={"spike_window": 4})
    calm = outcomes_of([5, 6, 5, 6], [1, 2, 1, 2])
    recent = decided(calm, config.numerics)[1]
    for name, spike in zip(("loss", "gradient norm"), outcomes_of([50, 5], [1, 50]), strict=True):
        said = refuse(config, 4, judged(spike, recent, config.numerics))
        assert said.startswith(f"step 5 is a spike and was not applied: its {name} of 50 is")
        assert "the mean of the 4 steps before" in said


def test_as_many_spikes_in_a_row_as_are_allowed_end_the_run() -> None:
    config = make_config(numerics={"spike_window": 4, "spike_limit": 3})
    end_divergence(config, 8, replace(CALM, spike="its loss", skipped=2))
    with pytest.raises(Diverged, match=r"step 10: 3 steps in a row .*spike_limit = 3"):
        end_divergence(config, 9, replace(CALM, spike="its loss", skipped=3))


def test_what_is_remembered_has_the_same_bits_in_a_manifest_again() -> None:
    random = np.random.default_rng(3)
    values = [*random.lognormal(0, 9, 200).tolist(), 5e-324, 1.7e308, 0.1, 3.0]
    recent = RecentSteps(tuple(values), tuple(reversed(values)))
    written = json.loads(msgspec.json.encode(recent_to_data(recent)))
    assert recent_from_data(written, "here") == recent
    assert recent_to_data(RecentSteps()) == {}
    assert recent_from_data({}, "here") == RecentSteps()


@pytest.mark.parametrize("wrong", [7, {"losses": ["a"]}, {"losses": [1.0] * 5000}, [[1.0]]])
def test_what_is_no_record_of_steps_is_an_error_that_says_where(wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=r"step-7/manifest.json: recent_steps"):
        recent_from_data({"recent_steps": wrong}, "step-7")


TRAIN = {"steps": 14, "global_batch": 6}
MODEL = {"layers": 2}


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, Any]:
    """The bits of one process with the guard."""
    config = make_config(train=TRAIN, model=MODEL, numerics=GUARD)
    return bits_of(run_training(cluster, config))


@pytest.mark.mp
def test_a_killed_rank_and_its_replacement_leave_out_the_same_steps(
    start: Starter, expected: dict[str, Any]
) -> None:
    run = start(
        train=TRAIN,
        model=MODEL,
        numerics=GUARD,
        parallel={"data": 2},
        elastic=pace({"verify_every": 2, "chaos": [fault("kill", 1, 5, "vote")]}, 0.2),
    )
    assert run.finish() == 0, run.output()
    assert any(event["joined"] for event in run.events() if "plan" in event and event["lost"] == [])
    assert run.bits() == expected
    skipped = [line["step"] for line in run.steps() if line.get("skipped") == "spike"]
    assert 2 <= len(skipped) <= 10
    told = [event["step"] for event in run.events("step_skipped")]
    assert set(told) <= set(skipped)
    assert len(skipped) - len(told) <= 1  # that of the interrupted step may be lost with its rank


@pytest.mark.mp
def test_a_resumed_run_remembers_the_steps_before(
    cluster: Cluster, expected: dict[str, Any], tmp_path: Path
) -> None:
    for ranks, stop_after in ((2, 5), (1, 9), (2, 0)):
        config = make_config(
            train={**TRAIN, "stop_after": stop_after},
            model=MODEL,
            numerics=GUARD,
            parallel={"pipeline": ranks},
        )
        cluster.run(
            "support.runs.small_runs:train_in",
            ranks,
            config=msgspec.to_builtins(config),
            root=str(tmp_path),
        )
    lines = metrics_of(tmp_path)
    steps = [(line["step"], line["loss_hex"], line["grad_norm_hex"]) for line in lines]
    digest = [event["parameter_digest"] for event in events_of(tmp_path, "run_finished")]
    assert {"steps": steps, "digest": digest} == expected
