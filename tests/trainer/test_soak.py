"""A long run with a failure every 20 seconds: equal bits at the end, and nothing leaks. See
`make soak`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.processes.cluster import Cluster
from support.runs.elastic_runs import HOLDFAST, ElasticRun, Starter, bits_of, pace
from support.runs.small_runs import make_config, run_training

SOAK_S = float(os.environ.get("HOLDFAST_SOAK_S", "0"))
EVERY_S = float(os.environ.get("HOLDFAST_SOAK_EVERY_S", "20"))
PACE_S = 0.25
MEMBERS = 4
FAULTS = ("kill", "kill two", "stop", "hold-lock", "exit")

pytestmark = [
    pytest.mark.mp,
    pytest.mark.chaos,
    pytest.mark.timeout(0),
    pytest.mark.skipif(SOAK_S == 0, reason="takes an hour: make soak"),
]


@dataclass(frozen=True)
class Footprint:
    """What one process has, by /proc."""

    descriptors: int
    threads: int
    resident_mib: float


def footprint(pid: int) -> Footprint:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Footprint(
        len(os.listdir(f"/proc/{pid}/fd")),
        int(status["Threads"]),
        int(status["VmRSS"].split()[0]) / 1024,
    )


def hit(run: ElasticRun, kind: str, rng: random.Random) -> None:
    """One fault; never at rank 0, whose process is to live through all of them if the others let
    it.
    """
    living = run.living()
    victims = rng.sample([rank for rank in living if rank != 0], 2)
    if kind == "kill":
        run.kill(victims[0])
    elif kind == "kill two":
        for rank in (2, 3):  # all of the second node
            run.kill(rank)
    elif kind == "stop":
        run.kill(victims[0], signal.SIGSTOP)
    else:
        subprocess.run(
            [*HOLDFAST, "chaos", str(run.root), "--fault", kind, "--rank", str(victims[0])],
            check=True,
            capture_output=True,
        )


@pytest.mark.parametrize("shard", ["optimizer", "parameters"])
def test_soak(start: Starter, cluster: Cluster, shard: str) -> None:
    steps = int(SOAK_S / PACE_S)
    train = {"steps": steps, "eval_every": 0}
    run = start(
        train=train,
        parallel={"data": 2, "pipeline": 2, "shard": shard},
        checkpoint={"every": 50, "keep": 2},
        elastic=pace({"hang_timeout_s": 2.0, "verify_every": 25}, PACE_S),
    )
    run.wait_for_members(MEMBERS)
    lasting = {"agent 0": run.agent(0), "agent 1": run.agent(3), "launcher": run.process.pid}
    rng = random.Random(7)
    seen: dict[str, list[Footprint]] = {}
    hits = 0
    next_s = time.monotonic() + EVERY_S
    while run.process.poll() is None:
        time.sleep(0.1)
        if time.monotonic() < next_s or len(run.living()) < MEMBERS:
            continue
        if len(run.steps()) > steps - 3 * EVERY_S / PACE_S:
            continue  # near the end nothing more is disturbed
        first = run.living()[0]
        for name, pid in {**lasting, f"worker 0.{first['incarnation']}": first["pid"]}.items():
            seen.setdefault(name, []).append(footprint(pid))
        hit(run, FAULTS[hits % len(FAULTS)], rng)
        hits += 1
        next_s = time.monotonic() + EVERY_S
    assert run.process.returncode == 0, run.output()
    for name, found in seen.items():
        for what in ("descriptors", "threads", "resident_mib"):
            print(name, what, [round(getattr(one, what)) for one in found])
    print(f"{hits} faults, {len(run.events('recovered'))} recoveries, {steps} steps")
    assert hits >= SOAK_S / EVERY_S / 4, "too few faults: a rank was away for long"
    expected = run_training(cluster, make_config(train=train), timeout_s=10 * SOAK_S)
    assert run.bits() == bits_of(expected)
    assert len(run.events("recovered")) >= hits
    for name, found in seen.items():
        early, late = found[len(found) // 4], found[-1]
        assert late.descriptors <= early.descriptors + 8, (name, early, late)
        assert late.threads <= early.threads + 4, (name, early, late)
        assert late.resident_mib <= 1.1 * early.resident_mib + 16, (name, early, late)
    started = {event["pid"] for event in run.events("worker_started")}
    assert not [pid for pid in started if Path(f"/proc/{pid}/fd").exists()]
