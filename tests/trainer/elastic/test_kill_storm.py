"""At least 200 processes are killed at random instants, over many layouts, and no bit changes.
See `make soak`."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest

from holdfast.elastic.faults import Fault, ask_for
from holdfast.parallel.plan.block_transfers import held_blocks, missing_blocks
from holdfast.parallel.plan.serialization import plan_from_data
from holdfast.trainer.config.loading import load_config
from holdfast.trainer.step.planning import plan_of
from support.processes.cluster import Cluster
from support.runs.elastic_runs import ElasticRun, Starter, bits_of, pace
from support.runs.small_runs import make_config, run_training

STORM = "HOLDFAST_SOAK_S" in os.environ
KILLS = 200
LONGEST_S = 1800.0
MOST_KILLS = 15
"""In one run: a run that loses all its ranks again and again gets nowhere."""
STEPS = 100
PACE_S = 0.4
RESTED_STEPS = 10
"""No rank is killed near the end, so that every run ends with all its ranks."""
AXES = ("data", "pipeline", "tensor", "context")
PARTS: dict[str, Any] = {
    "model": {"layers": 2},
    "train": {"context_chunks": 2, "global_batch": 6},
    "numerics": {"tensor_shards": 4},
}
EXPERTS: dict[str, Any] = {
    "model": {
        **{"family": "mixtral", "layers": 2, "heads": 4, "kv_heads": 2},
        **{"experts": 16, "experts_per_token": 2, "router_aux_loss_coef": 0.1, "init_std": 0.2},
    },
    "train": {"global_batch": 8},
}


@dataclass(frozen=True)
class Case:
    """What is trained, and the layout that is hit."""

    parallel: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)
    elastic: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return prod(self.parallel.get(axis, 1) for axis in AXES)

    @property
    def alone(self) -> dict[str, Any]:
        """The sections of the run with the same bits that loses nothing."""
        found = {**self.sections, "train": {"steps": STEPS, **self.sections.get("train", {})}}
        if not self.sections and self.parallel["tensor"] > 1:
            found["parallel"] = {"tensor": self.parallel["tensor"]}
        return found


def _cases() -> list[Case]:
    whole = [
        Case({"data": data, "pipeline": pipeline, "tensor": tensor})
        for data in (1, 2, 3, 4)
        for pipeline in (1, 2, 3)
        for tensor in (1, 2)
        if 2 <= data * pipeline * tensor <= 8
    ]
    in_parts = [  # their stage replicas go on with fewer ranks
        *((1, 1, 4, 1), (2, 1, 4, 1), (1, 2, 4, 1), (2, 2, 2, 1)),
        *((2, 1, 2, 2), (1, 2, 2, 2), (2, 2, 1, 2)),
    ]
    of_parts = [
        Case(
            dict(zip(AXES, degrees, strict=True)) | ({"stretches": 2} if degrees[3] == 1 else {}),
            PARTS,
        )
        for degrees in in_parts
    ]
    following = {"expert_steps": 2}
    of_experts = [
        Case({"data": 8, "expert": 8}, EXPERTS),
        Case({"data": 8, "expert": 4, "shard": "gradients"}, EXPERTS),
        Case({"data": 6, "expert": 6, "shard": "parameters"}, EXPERTS),
        Case({"data": 4, "expert": 2, "pipeline": 2}, EXPERTS),
        Case({"data": 5, "expert": 5, "expert_replicas": "auto"}, EXPERTS, following),
        Case(
            {"tensor": 2, "data": 3, "expert": 6, "expert_replicas": 2},
            {**EXPERTS, "numerics": {"tensor_shards": 2}},
        ),
    ]
    return [*whole, *of_parts, *of_experts]


CASES = _cases()
FIRST = int(os.environ.get("HOLDFAST_STORM_FIRST", "0"))
"""The number of the first case."""
CHOICES = ("one", "one", "one", "two in a row", "two in a row", "a node", "any two")

pytestmark = [
    pytest.mark.mp,
    pytest.mark.chaos,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not STORM, reason="takes half an hour: make soak"),
]


@dataclass
class Storm:
    """What hits one run."""

    run: ElasticRun
    members: int
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    _slowed: set[int] = field(default_factory=set)
    _steps: int = 0

    def blow(self) -> None:
        """Kill again and again, each time once all ranks take part, until it is enough or nearly
        over."""
        while (
            self.run.process.poll() is None
            and len(self.run.steps()) < STEPS - RESTED_STEPS
            and sum(self.kills.values()) < MOST_KILLS
        ):
            time.sleep(self.rng.uniform(0.0, 0.6))
            if self._all_take_part():
                self._keep_pace()
                self._hit(self.rng.choice(CHOICES))

    def _all_take_part(self) -> bool:
        """Whether all ranks have places, their newest processes too, and a step was committed
        since.

        Workers that are killed again and again before they can take part are given up by their
        agent.
        """
        events = self.run.events()
        kinds = [event["event"] for event in events]
        changes = [number for number, event in enumerate(events) if "plan" in event]
        steps = len(self.run.steps())
        if not changes or "worker_started" in kinds[changes[-1] :] or steps <= self._steps:
            return False
        if self.run.members() < self.members or len(self.run.living()) < self.members:
            return False
        self._steps = steps
        return True

    def _keep_pace(self) -> None:
        """Make the lowest rank's newest process slow too: tiny steps would be over before others
        join."""
        worker = self.run.living().get(0)
        if worker is not None and worker["pid"] not in self._slowed:
            self._slowed.add(worker["pid"])
            step, incarnation = len(self.run.steps()) + 3, worker["incarnation"]
            slow = Fault("slow", 0, step, seconds=PACE_S, incarnation=incarnation)
            ask_for(self.run.root / "chaos.jsonl", slow)

    def _hit(self, choice: str) -> None:
        living = self.run.living()
        first = self.rng.choice(sorted(living))
        node = [rank for rank in sorted(living) if living[rank]["node"] == living[first]["node"]]
        if choice == "a node":
            victims, gap_s = node, 0.0
        elif choice == "two in a row":  # the second while the first is recovered from, or replaced
            victims, gap_s = [first, self.rng.choice(node)], self.rng.uniform(0.0, 2.0)
        elif choice == "any two":
            victims, gap_s = self.rng.sample(sorted(living), 2), 0.0
        else:
            victims, gap_s = [first], 0.0
        for number, victim in enumerate(victims):
            if number:
                time.sleep(gap_s)
            worker: dict[str, Any] | None = self.run.living().get(victim)
            if worker is not None and self.run.process.poll() is None:
                self.kills[choice] += _kill(worker["pid"])


def needless_rollbacks(run: ElasticRun) -> list[int]:
    """The generations that went back to a checkpoint though every block had a living holder."""
    first = plan_of(load_config(run.root / "config.toml", []))
    found = []
    for path in sorted(run.root.glob("incidents/generation-*.json")):
        incident = json.loads(path.read_text())
        if incident["from_checkpoint"] is None:
            continue
        plan = plan_from_data(first, incident["plan_before"])
        after = {(member["rank"], member["incarnation"]) for member in incident["after"]}
        living = [m["rank"] for m in incident["before"] if (m["rank"], m["incarnation"]) in after]
        if not missing_blocks(
            plan, held_blocks(plan, set(living) & set(plan.stage_replicas.ranks))
        ):
            found.append(incident["generation"])
    return found


def _kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1


def test_two_hundred_kills_change_no_bit(start: Starter, cluster: Cluster) -> None:
    expected: dict[str, dict[str, Any]] = {}
    kills: Counter[str] = Counter()
    rounds = 0
    while sum(kills.values()) < KILLS or rounds < len(CASES) - FIRST:
        case = CASES[(FIRST + rounds) % len(CASES)]
        name = str(case.alone)
        if name not in expected:
            config = make_config(**case.alone)
            expected[name] = bits_of(run_training(cluster, config, timeout_s=900.0))
        run = start(
            **case.alone
            | {"parallel": case.parallel}
            | {"checkpoint": {"every": 7}, "elastic": pace(case.elastic, PACE_S)}
        )
        storm = Storm(run, case.ranks, random.Random(rounds))
        storm.blow()
        assert run.finish(LONGEST_S) == 0, run.output()
        assert run.bits() == expected[name], (storm.kills, run.root)
        assert needless_rollbacks(run) == [], run.root
        kills += storm.kills
        rolled_back = sum("step" in event for event in run.events("resumed"))
        print(
            f"{case.parallel}: {sum(storm.kills.values())} killed {dict(storm.kills)}, "
            f"{len(run.events('recovered'))} recoveries, {rolled_back} from a checkpoint",
            flush=True,
        )
        rounds += 1
    print(f"{sum(kills.values())} processes killed: {dict(kills)}, {rounds} runs")
