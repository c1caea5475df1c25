"""The incidents of a run in sentences, from files that may be old, foreign or cut off."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from holdfast.launch.report import found_in, report_lines
from holdfast.parallel.output import Evidence, ThreadStack, write_evidence
from holdfast.parallel.output.evidence.record import MemoryFacts, StackFrame, ThreadFacts
from holdfast.trainer.run import RunDirectory
from support.processes.forked_command import ForkedCommand

MEMBERS = [{"rank": rank, "node": f"node-{rank}"} for rank in range(3)]
INCIDENT: dict[str, Any] = {
    "time": 1_000_000.0,
    "generation": 2,
    "lost": [1],
    "step": 4,
    "within_step": True,
    "committed": False,
    "replayed_steps": 1,
    "recomputed_micro_batches": 2,
    "agree_s": 0.25,
    "edit_s": 0.5,
    "move_s": 1.0,
    "total_s": 2.0,
    "moved_bytes": 2 << 20,
    "from_checkpoint": None,
    "losses": [
        {
            "rank": 1,
            "incarnation": 0,
            "node": "node-1",
            "cause": "killed by SIGKILL",
            "detected_s": 0.5,
        }
    ],
    "notices": [{"kind": "ended", "identity": "1", "cause": "killed by SIGKILL", "node": "node-1"}],
    "before": MEMBERS,
    "after": [MEMBERS[0], MEMBERS[2]],
    "plan_before": {},
}
"""An incident as runs wrote it before there was evidence."""
EVIDENCE = Evidence(
    role="hung",
    rank=1,
    node="node-1",
    about="1",
    reason="hung: rank 0 has waited",
    generation=1,
    step=5,
    busy="it said that it would save for 3 s more at most",
    stacks=(ThreadStack("main thread", (StackFrame("disk.py", 7, "write_block"),)),),
    threads=(ThreadFacts(17, "python", "D", "folio_wait", "fsync of /mnt/disk/file"),),
    memory=MemoryFacts(resident_bytes=3 << 20, peak_bytes=4 << 20, limit_bytes=8 << 20, kills=1),
    notes=("no native stacks: gdb took longer than 0.9 s",),
    time=999_999.0,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path)
    found.incidents.mkdir()
    return found


def put(run: RunDirectory, name: str = "generation-000002.json", **changes: Any) -> Path:
    path = run.incidents / name
    path.write_text(json.dumps({**INCIDENT, **changes}))
    return path


def report(run: RunDirectory) -> str:
    return "\n".join(report_lines(found_in(run)))


def test_slow_ranks_and_links_are_told(run: RunDirectory) -> None:
    slow = {"time": 1.0, "event": "slow_link", "step": 20, "message": "the link is slow"}
    others = [{**slow, "event": "data_opened"}, {**slow, "message": 3}, {**slow, "step": "x"}]
    also = {**slow, "event": "straggler", "step": 30, "message": "rank 1 is slow"}
    run.events.write_text("".join(f"{json.dumps(e)}\n" for e in (slow, *others, also)))
    assert report(run).endswith(
        "Slow ranks and links:\n  step 20: the link is slow\n  step 30: rank 1 is slow"
    )


def test_a_loss_is_told_without_evidence(run: RunDirectory) -> None:
    put(run)
    told = report(run)
    assert "Incident 1, 1970-01-12 13:46:40 UTC: rank 1 on node node-1 was lost in step 5" in told
    assert "killed by SIGKILL" in told
    assert "Noticed by its agent, which saw its process end, 0.5 s after its last sign of" in told
    assert "No step was lost; of step 5, 2 micro-batches had to be computed again." in told
    assert "took 2.00 s: agreement 0.25 s, connections 0.50 s, state 1.00 s (2.0 MiB moved)" in told
    assert "Of ranks 0-2, ranks 0, 2 went on, as generation 2." in told


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"committed": True}, "was finished without it; nothing was computed again"),
        ({"within_step": False}, "Nothing was lost"),
        ({"from_checkpoint": 3}, "went back to the checkpoint of step 3, and 1 step"),
    ],
)
def test_the_cost_of_a_loss_is_told(
    run: RunDirectory, changes: dict[str, Any], expected: str
) -> None:
    put(run, **changes)
    assert expected in report(run)


def test_evidence_is_told_with_the_loss_that_it_is_about(run: RunDirectory) -> None:
    put(run, evidence=[{"rank": 1, "node": "node-1", "file": "evidence-a.json"}])
    later = {**INCIDENT["losses"][0], "rank": 2}
    put(run, "generation-000003.json", generation=3, time=1_000_100.0, losses=[later])
    write_evidence(run.incidents / "evidence-a.json", EVIDENCE)
    first, _, second = report(run).partition("Incident 2")
    for expected in (
        "It was in disk.py:7 in write_block.",
        "its main thread waits for a device or a disk, and no signal ends that, in the system call "
        "fsync of /mnt/disk/file (folio_wait).",
        "It was in step 5 of generation 1; it said that it would save for 3 s more at most.",
        "3.0 MiB resident (at most 4.0 MiB)",
        "1 process of its group killed for lack",
        "Not known: no native stacks: gdb took longer than 0.9 s.",
    ):
        assert expected in first
    assert "write_block" not in second


def test_evidence_that_an_incident_does_not_name_is_told_where_it_belongs(
    run: RunDirectory,
) -> None:
    put(run)
    write_evidence(run.incidents / "evidence-a.json", EVIDENCE)
    assert "Evidence of no incident" not in report(run)
    assert "write_block" in report(run)
    (run.incidents / "generation-000002.json").unlink()
    assert "no incidents" in report(run)
    assert "Evidence of no incident, evidence-a.json" in report(run)


def test_what_cannot_be_read_is_said(run: RunDirectory) -> None:
    path = put(run)
    content = path.read_bytes()
    pointers = [
        {"rank": 1, "node": "node-1", "place": "disk.py:7 in f", "file": "evidence-gone.json"},
        {"rank": 0, "node": "node-0", "file": "evidence-torn.json"},
    ]
    put(run, evidence=pointers)
    (run.incidents / "evidence-torn.json").write_text('{"role": "hung", "ra')
    (run.incidents / "generation-000003.json").write_bytes(content[: len(content) // 2])
    (run.incidents / "generation-000004.json").write_text('{"generation": "four"}')
    (run.incidents / "generation-000005.json").mkdir()
    told = report(run)
    assert "It was in disk.py:7 in f. Its evidence, evidence-gone.json, is not here; node" in told
    assert "Its evidence, evidence-torn.json, cannot be read: " in told
    for number in (3, 4, 5):
        assert f"generation-00000{number}.json cannot be read: " in told
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        assert "generation-000002.json cannot be read: " in report(run)


@pytest.mark.mp
def test_the_command_tells_of_several_runs_and_of_what_is_none(
    run: RunDirectory, tmp_path: Path
) -> None:
    put(run, losses=[{**INCIDENT["losses"][0], "cause": "\x1b[31mred"}])

    def said(*arguments: str) -> tuple[int, str]:
        command = ForkedCommand(arguments, tmp_path / "said", os.environ)
        return command.wait(timeout=120), (tmp_path / "said").read_text()

    other = tmp_path / "other"
    other.mkdir()
    code, told = said("report", str(run.root), str(other), "--text")
    assert (code, told.count("Incident 1")) == (0, 1)
    assert "other: no incidents" in told
    assert "\\x1b[31mred" in told
    assert said("report", str(run.root))[0] == 2
    code, told = said("report", str(tmp_path / "none"), "--text")
    assert code == 2
    assert "does not exist" in told
