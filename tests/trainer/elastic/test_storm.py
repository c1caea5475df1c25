"""Storms: nodes are cut off, agents stop, disks stall and fill, on a busy machine. Every run ends,
with the right bits and true exit codes, costs no healthy rank and leaves nothing. See `make soak`.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.network.elastic_network import network
from support.processes.cluster import Cluster
from support.processes.disks import disk, slow_sync_library
from support.runs.elastic_runs import Starter, bits_of
from support.runs.small_runs import make_config, run_training
from support.runs.storm_runs import Storm, busy, place, start_storm, sweep
from support.runs.storms import DEADLY, KINDS, OF_THE_DISK, Blow, Trial, timeline, trial_of

TRIALS = int(
    os.environ.get("HOLDFAST_STORM_TRIALS", "30" if "HOLDFAST_SOAK_S" in os.environ else "0")
)
FIRST = int(os.environ.get("HOLDFAST_STORM_FIRST", "0"))
LOAD = int(os.environ.get("HOLDFAST_STORM_LOAD", "10"))
TRAIN = {1: {"steps": 80}, 2: {"steps": 40, "global_batch": 4}}
"""By tensor-parallel degree: a step of two ranks has many messages, each slow on a busy machine."""
SHORT_TRAIN = {"steps": 20, "global_batch": 4}
DISK_MIB = 64
BUSY_S = 1200.0
"""The longest that a trial keeps the machine busy."""

SHORT = Trial(
    number=0,
    layout=(2, 2, 1),
    nodes=2,
    blows=(
        Blow("stall the disk", 0.5, 5.0, 0, 0.0),
        Blow("stop an agent for good", 1.0, 0.0, 1, 0.0),
    ),
)


def test_a_storm_depends_on_its_number_alone_and_leaves_a_node_to_go_on() -> None:
    seen: Counter[str] = Counter()
    cuts_s = set()
    for number in range(len(KINDS) * 30):
        trial = trial_of(number)
        assert trial == trial_of(number)
        kinds = [blow.kind for blow in trial.blows]
        assert kinds[0] == KINDS[number % len(KINDS)]
        assert sum(kind in DEADLY for kind in kinds) <= 1
        assert trial.ranks >= trial.nodes > max(blow.node for blow in trial.blows)
        moments = timeline(trial)
        assert moments == sorted(moments, key=lambda moment: moment.at_s)
        assert [moment.blow for moment in moments if moment.begins] == list(trial.blows)
        assert {moment.blow for moment in moments if not moment.begins} == {
            blow for blow in trial.blows if blow.seconds
        }
        assert max(Counter(kind for kind in kinds if kind in OF_THE_DISK).values(), default=0) <= 1
        if trial.has_network:
            assert not set(kinds) & set(DEADLY)
            cuts_s |= {blow.seconds for blow in trial.blows if blow.kind == "cut a node"}
        seen.update(kinds)
    assert set(seen) == set(KINDS)
    assert cuts_s == {20.0, 40.0, 60.0}


@pytest.mark.mp
@pytest.mark.chaos
def test_a_stalled_disk_holds_writes_until_it_goes_on_and_a_full_one_has_no_room(
    tmp_path: Path,
) -> None:
    with disk(tmp_path / "disk", 8) as tried:
        path = tried.folder / "file"
        tried.stall()
        child = os.fork()
        if child == 0:
            path.write_text("written")
            os._exit(0)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        tried.go_on()
        assert os.waitpid(child, 0) == (child, 0)
        tried.fill()
        with pytest.raises(OSError, match="No space left"):
            (tried.folder / "more").write_bytes(bytes(1 << 16))
        tried.free()
        (tried.folder / "more").write_bytes(bytes(1 << 16))


@pytest.mark.mp
@pytest.mark.chaos
def test_a_disk_that_a_killed_test_has_stalled_goes_on(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 8) as tried:
        child = os.fork()
        if child == 0:
            tried.stall()
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0) == (child, signal.SIGKILL)
        (tried.folder / "file").write_text("written")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial came to."""

    told: tuple[str, ...]
    codes: tuple[int | None, ...]
    lost: int
    ended_s: float
    """Seconds from the last fault's end to the end of the last command."""


def try_one(trial: Trial, folder: Path, expected: dict[str, Any], train: dict[str, int]) -> Outcome:
    """Run a trial to its end, and hold it to all that is promised. What fails is kept in
    `folder`.
    """
    folder.mkdir(exist_ok=True)
    library = slow_sync_library(folder)
    with ExitStack() as held:
        own_disk = held.enter_context(disk(folder / "disk", DISK_MIB))
        where = held.enter_context(place(folder))
        net = held.enter_context(network("abcd"[: trial.nodes])) if trial.has_network else None
        starter = Starter(own_disk.folder)
        held.callback(starter.close)
        storm = start_storm(starter, trial, where, library, own_disk, net, train=train)
        try:
            return judged(storm, library, expected)
        except AssertionError:
            shutil.copytree(own_disk.folder, folder / "kept")
            raise


def judged(storm: Storm, library: Path, expected: dict[str, Any]) -> Outcome:
    """Let the storm blow, and check how the run ends."""
    storm.blow()
    over_s = time.monotonic()
    codes = storm.codes()
    ended_s = time.monotonic() - over_s
    said = f"{storm.trial}\n{storm.told}\n{codes}\n{storm.run.output()}"
    assert storm.told, f"it was over before the first fault: {said}"
    for task, code in enumerate(codes):
        assert code in ({0, 3} if task in storm.cut else {0}), said
    assert storm.run.bits() == expected, said
    assert storm.healthy_lost() == {}, said
    if any(blow.kind in DEADLY for blow in storm.trial.blows) and storm.place.left():
        assert sweep(storm, library) == 0, said
    assert storm.place.left() == [], said
    return Outcome(tuple(storm.told), tuple(codes), storm.lost().total(), ended_s)


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.chaos
def test_a_stalled_disk_and_a_stopped_agent_cost_that_node_alone(
    tmp_path: Path, cluster: Cluster
) -> None:
    expected = bits_of(run_training(cluster, make_config(train=SHORT_TRAIN)))
    outcome = try_one(SHORT, tmp_path / "trial", expected, SHORT_TRAIN)
    assert len(outcome.told) == 3, outcome
    assert outcome.lost <= 2, outcome


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.timeout(0)
@pytest.mark.skipif(not TRIALS, reason="takes a minute a trial: make soak")
def test_every_run_of_a_storm_ends_with_its_bits(tmp_path: Path, cluster: Cluster) -> None:
    @cache
    def expected(tensor: int) -> dict[str, Any]:
        config = make_config(train=TRAIN[tensor], parallel={"tensor": tensor})
        return bits_of(run_training(cluster, config, timeout_s=900.0))

    wrong = []
    for number in range(FIRST, FIRST + TRIALS):
        trial = trial_of(number)
        bits = expected(trial.layout[2])
        try:
            with busy(LOAD, BUSY_S):
                outcome = try_one(trial, tmp_path / f"trial-{number}", bits, TRAIN[trial.layout[2]])
        except AssertionError as error:
            wrong.append(f"{number}: {error}")
            print(f"{number}: wrong: {error}", flush=True)
            continue
        print(
            f"{number} {trial.layout}, {trial.shard}, {trial.nodes} nodes, "
            f"{', '.join(outcome.told)}: exit codes "
            f"{outcome.codes}, {outcome.lost} ranks lost, ended after {outcome.ended_s:.1f} s",
            flush=True,
        )
    assert wrong == []
