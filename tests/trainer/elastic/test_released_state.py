"""What a change of plan replaces leaves memory at once, without Python's garbage collector."""

from __future__ import annotations

import gc
import json
import os
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from holdfast.parallel.optimizer import GradientAccumulator, ParameterBuffer
from holdfast.trainer.step import Training
from support.runs.elastic_runs import Starter, fault, pace

pytestmark = [pytest.mark.mp, pytest.mark.chaos, pytest.mark.slow]

NOTES = "HOLDFAST_TEST_IN_MEMORY"
"""The variable that names the folder of the workers' notes."""
WATCHED = (Training, GradientAccumulator, ParameterBuffer)
MOVING: dict[str, Any] = {
    "model": {
        "family": "mixtral",
        "layers": 2,
        "experts": 8,
        "experts_per_token": 1,
        "vocab": 8,
        "init_std": 0.3,  # routers that prefer some experts
    },
    "train": {"steps": 14, "global_batch": 4, "seq_len": 32, "seed": 1},
    "checkpoint": {"every": 2, "keep": 2},
}


SECTIONS = (*MOVING, "parallel")


def places_of_experts(training: Training) -> dict[str, list[int]]:
    """The addresses of what a rank has of each expert: parameters, and state of owned blocks.

    Ranks that share an expert own blocks of it each: state has a key for the blocks of it.
    """
    found: dict[str, list[int]] = {}
    for chunk in training.chunks:
        for row, parameter in chunk.rows():
            if row.spec.expert is not None:
                key = f"layer {row.layer}, expert {row.spec.expert}"
                found.setdefault(key, []).append(parameter.data_ptr())
    of_expert: dict[tuple[int, int], list[int]] = {}
    for number, owned in enumerate(training.optimizer.owned):
        if owned.spec.expert is not None:
            of_expert.setdefault((owned.block.layer, owned.spec.expert), []).append(number)
    for numbers in of_expert.values():
        blocks = [training.optimizer.owned[number].key for number in numbers]
        states = (training.optimizer.block_state(number) for number in numbers)
        found[f"state of {blocks}"] = [v.data_ptr() for of in states for v in of.values()]
    return found


def note_what_is_in_memory() -> None:
    """Have each worker note, as each step begins, how many of the watched things it has."""
    made: list[weakref.ref[Any]] = []
    compute = Training.compute

    def counting(cls: type) -> None:
        begin = cls.__init__

        def __init__(self: Any, *arguments: Any, **more: Any) -> None:
            made.append(weakref.ref(self))
            begin(self, *arguments, **more)

        cls.__init__ = __init__  # pyrefly: ignore[bad-assignment]

    def noting(self: Training, step: int, *at: Any) -> Any:
        gc.disable()
        alive = [type(found).__name__ for ref in made if (found := ref()) is not None]
        count = {cls.__name__: alive.count(cls.__name__) for cls in WATCHED}
        noted = {"step": step, "plan": self.plan.generation, "experts": places_of_experts(self)}
        line = json.dumps(noted | count)
        with (Path(os.environ[NOTES]) / f"{self.rank}-{os.getpid()}").open("a") as notes:
            notes.write(f"{line}\n")
        return compute(self, step, *at)

    for cls in WATCHED:
        counting(cls)
    Training.compute = noting  # pyrefly: ignore[bad-assignment]


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"data": 4, "expert": 4, "expert_replicas": "auto"}},
        {"parallel": {"data": 4, "expert": 4, "shard": "parameters"}},
        {"parallel": {"data": 2, "pipeline": 2}, "train": {"recompute": "full"}},
    ],
    ids=["moved experts", "sharded parameters", "moved layers"],
)
def test_a_worker_has_one_training_in_memory_whatever_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, dict[str, Any]]
) -> None:
    """What it has of experts that stay is where it was: neither copied, nor there twice."""
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setenv(NOTES, str(notes))
    start = Starter(tmp_path, before="test_released_state:note_what_is_in_memory")
    try:
        keys = {name: MOVING.get(name, {}) | sections.get(name, {}) for name in SECTIONS}
        run = start(
            **keys,  # pyrefly: ignore[bad-argument-type]
            elastic=pace(
                {"expert_steps": 2, "local_nodes": 4, "chaos": [fault("kill", 3, 6, "backward")]},
                0.3,
            ),
        )
        assert run.finish() == 0, run.output()
    finally:
        start.close()
    of_workers = [
        [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        for file in sorted(notes.iterdir())
    ]
    noted = [of_step for of_worker in of_workers for of_step in of_worker]
    assert len({of_step["plan"] for of_step in noted}) >= 2, "the plan did not change"
    assert [of_step for of_step in noted if {of_step[c.__name__] for c in WATCHED} != {1}] == []
    if sections["parallel"].get("shard") == "parameters":
        return  # a share of all experts is one piece
    for of_worker in of_workers:
        for before, after in pairwise(of_step["experts"] for of_step in of_worker):
            stayed = before.keys() & after.keys()
            assert {key: before[key] for key in stayed} == {key: after[key] for key in stayed}
