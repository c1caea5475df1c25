"""Of a run, the checkpoints with the lowest losses stay, through restarts and losses of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.loading import check_config
from holdfast.trainer.run.resume import best_rule, find_resume
from support.processes.cluster import Cluster
from support.runs.elastic_runs import Starter, fault
from support.runs.small_runs import make_config, metrics_of

MODEL = {"layers": 2}
TRAIN = {"steps": 8, "global_batch": 4, "eval_every": 1, "eval_batches": 1}
OPTIMIZER = {"lr": 0.3, "min_lr": 0.3, "warmup_steps": 8}
"""It becomes too high, so that losses rise after the first steps."""
CHECKPOINT = {"every": 1, "keep": 1, "keep_best": 2}


def config_of(**sections: Any) -> RunConfig:
    train = {**TRAIN, **sections.pop("train", {})}
    kept: dict[str, Any] = dict(model=MODEL, optimizer=OPTIMIZER, checkpoint=CHECKPOINT)
    return make_config(train=train, **{**kept, **sections})


def best_steps(lines: list[dict[str, Any]], count: int) -> list[int]:
    losses = {line["step"]: line["validation"]["held_out"] for line in lines}
    return sorted(losses, key=lambda step: (losses[step], step))[:count]


def kept(root: Path) -> set[int]:
    return {int(path.name[5:]) for path in (root / "checkpoints").glob("step-????????")}


@pytest.mark.mp
def test_the_best_stay_through_restarts_and_losses_and_one_of_them_can_be_resumed_from(
    cluster: Cluster, start: Starter, tmp_path: Path
) -> None:
    root = tmp_path / "alone"
    for stop_after, data in ((3, 1), (5, 2), (0, 1)):
        config = config_of(train={"stop_after": stop_after}, parallel={"data": data})
        plain = msgspec.to_builtins(config)
        cluster.run("support.runs.small_runs:train_in", data, config=plain, root=str(root))
    best = best_steps(metrics_of(root), 2)
    assert max(best) < 6, "the case needs best checkpoints that are not among the newest"
    assert kept(root) == {8, *best}
    assert (root / "checkpoints" / "best").read_text() == f"step-{best[0]:08d}\n"
    (found,) = find_resume(root, config_of(), "best").candidates
    assert found == str(root / "checkpoints" / f"step-{best[0]:08d}")

    run = start(
        model=MODEL,
        train=TRAIN,
        optimizer=OPTIMIZER,
        checkpoint=CHECKPOINT,
        parallel={"data": 2},
        elastic={"chaos": [fault("kill", 0, best[1], "apply")]},
    )
    assert run.finish() == 0, run.output()
    assert len(run.events("rank_lost")) == 1
    assert run.steps()[-1]["validation_hex"] == metrics_of(root)[-1]["validation_hex"]
    committed = {event["step"] for event in run.events("checkpoint_committed")}
    assert best[1] in committed  # that of the step before may have been given up for the change
    best = best_steps([line for line in run.steps() if line["step"] in committed], 2)
    assert kept(run.root) == {8, *best}
    assert (run.root / "checkpoints" / "best").read_text() == f"step-{best[0]:08d}\n"


def test_the_first_set_counts_unless_another_is_named() -> None:
    sets = [{"name": "code", "kind": "text", "path": ["a"]}]
    first, other = config_of(), config_of(checkpoint={**CHECKPOINT, "best_by": "code"})
    named = config_of(data={"eval_fraction": 0.0, "validation": sets})
    names = [rule.name for config in (first, other, named) if (rule := best_rule(config))]
    assert names == ["held_out", "code", "code"]
    assert best_rule(config_of(checkpoint={})) is None


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"eval_every": 0}}, "checkpoint.keep_best = 2 needs losses"),
        ({"checkpoint": {"keep_best": 1, "best_by": "cod"}}, "checkpoint.best_by"),
        ({"checkpoint": {"best_by": "held_out"}}, "with keep_best = 0"),
    ],
)
def test_what_could_not_be_kept_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_config(config_of(**sections))


def test_without_losses_there_is_no_best_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no checkpoint of .* was evaluated on 'held_out'"):
        find_resume(tmp_path, config_of(), "best")
