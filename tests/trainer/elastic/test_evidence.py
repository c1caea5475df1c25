"""What hangs, and what fails, is found with the line of Python that it was in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from holdfast.parallel.output import Evidence, read_evidence
from holdfast.trainer.step import Training
from support.processes.cluster import Cluster
from support.runs.elastic_runs import HOLDFAST, ElasticRun, Starter, bits_of, fault
from support.runs.small_runs import make_config, run_training

pytestmark = [pytest.mark.mp, pytest.mark.chaos, pytest.mark.slow]

HANG_S = 2.0
MODEL = {"layers": 2}
TRAIN = {"steps": 12, "global_batch": 3}
PLACES = {
    "stop": ("elastic/faults.py", "<lambda>"),
    "hold-lock": ("elastic/faults.py", "_do"),
    "deadlock": ("elastic/session.py", "_deadlock"),
    "stuck-disk": ("elastic/faults.py", "write_without_end"),
}
"""By the kind of hang, the file and the function in which it hangs."""


def report_of(run: ElasticRun) -> str:
    done = subprocess.run(
        [*HOLDFAST, "report", str(run.root), "--text"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def evidence_of(run: ElasticRun, role: str) -> list[Evidence]:
    found = map(read_evidence, sorted(run.root.glob("incidents/evidence-*.json")))
    return [evidence for evidence in found if evidence.role == role]


@pytest.mark.parametrize("kind", PLACES)
def test_an_incident_shows_the_line_in_which_a_rank_hung(
    tmp_path: Path, cluster: Cluster, kind: str
) -> None:
    start = Starter(tmp_path)
    elastic = {"chaos": [fault(kind, 1, 6)], "hang_timeout_s": HANG_S, "respawn": False}
    try:
        run = start(train=TRAIN, model=MODEL, parallel={"data": 3}, elastic=elastic)
        assert run.finish() == 0, run.output()
    finally:
        start.close()
    expected = bits_of(run_training(cluster, make_config(train=TRAIN, model=MODEL)))
    assert run.bits()["steps"] == expected["steps"]
    assert [lost["rank"] for lost in run.events("rank_lost")] == [1]
    (hung,) = evidence_of(run, "hung")
    assert (hung.rank, hung.step) == (1, 6)
    places = [(frame.file, frame.function) for frame in hung.telling]
    file, function = PLACES[kind]
    assert any(there.endswith(file) and name == function for there, name in places), places
    assert hung.threads[0].state == ("T" if kind == "stop" else "S")
    assert hung.memory.resident_bytes > 0
    assert hung.operations
    if kind == "stuck-disk":
        assert hung.threads[0].call.startswith("write of pipe:")
    if kind in ("deadlock", "stuck-disk"):  # the others have waited for long before
        assert evidence_of(run, "waiting")
    incident = json.loads((run.root / "incidents" / "generation-000002.json").read_text())
    assert {"rank": 1, "incarnation": 0}.items() <= incident["evidence"][0].items()
    assert (run.root / "incidents" / incident["evidence"][0]["file"]).exists()
    told = report_of(run)
    assert f"in {function}\n" in told
    assert "which looked at it and killed it" in told


def fail_in_the_sixth_step() -> None:
    """Have rank 1 run out of memory in its sixth step."""
    compute, counted = Training.compute, [0]

    def failing(self: Any, *arguments: Any) -> Any:
        counted[0] += self.rank == 1
        if counted[0] == 6 and self.rank == 1:
            raise MemoryError("no 17 bytes are left")
        return compute(self, *arguments)

    Training.compute = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("elastic", [True, False])
def test_an_error_leaves_its_stack_the_last_operations_and_the_memory(
    tmp_path: Path, elastic: bool
) -> None:
    start = Starter(tmp_path, before="test_evidence:fail_in_the_sixth_step")
    try:
        run = start(
            train={**TRAIN, "steps": 8},
            model=MODEL,
            parallel={"data": 2},
            elastic={"enabled": elastic, "respawn": False},
        )
        assert (run.finish() == 0) == elastic, run.output()
    finally:
        start.close()
    (path,) = run.root.glob("incidents/evidence-*-failed.json")
    failed = read_evidence(path)
    assert failed.rank == 1
    assert failed.stacks[0].frames[0].function == "failing"
    assert failed.reason == "MemoryError: no 17 bytes are left"
    assert failed.memory.resident_bytes > 0
    assert failed.operations if elastic else "operation before: " in failed.error
    told = report_of(run)
    assert "in failing\n" in told
    assert "MemoryError: no 17 bytes are left" in told
    if elastic:
        assert "Evidence of no incident" not in told
        (incident,) = run.root.glob("incidents/generation-*.json")
        assert json.loads(incident.read_text())["evidence"][0]["file"] == path.name
