"""One elastic run in a storm: it is hit as a trial says, and what it was and left is read."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from support.network.elastic_network import Network
from support.processes.disks import Disk
from support.runs.elastic_runs import HOLDFAST, ElasticRun, Process, Starter, Task, fault
from support.runs.storms import OF_A_NODE, OF_THE_DISK, Blow, Trial, timeline

MARK = "HOLDFAST_TEST_STORM"
"""The environment variable that all processes of a run have."""
SLOW_MS = 1000
PACE_S = 0.25
PACED_INCARNATIONS = 4
PATIENCE_S = 280.0
"""How long a run may take after its last fault: `elastic.apart_s` twice, less than that.

A node that is left out ends within `apart_s` of that, or of the run's end.
"""
GONE_S = 20.0
"""Seconds in which the processes of a run that has ended are gone."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run keeps what it must not leave behind: one folder per kind, seen from outside."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid4().hex)

    @property
    def temporary(self) -> Path:
        """What the run has as TMPDIR."""
        return self.folder / "temporary"

    @property
    def memory(self) -> Path:
        """What the run has as /dev/shm."""
        return Path("/dev/shm") / f"storm-{self.mark}"

    @property
    def slow(self) -> Path:
        """Says by how many milliseconds a sync is longer."""
        return self.folder / "slow"

    def launcher(self, library: Path, below: Path, node: int = 0) -> tuple[str, ...]:
        """What a command of the run is started by. Its host has a name of its own."""
        variables = {
            **{MARK: self.mark, "TMPDIR": str(self.temporary), "LD_PRELOAD": str(library)},
            **{"HOLDFAST_TEST_SLOW_MS": str(self.slow), "HOLDFAST_TEST_SLOW_BELOW": str(below)},
        }
        own = f'mount --bind {self.memory} /dev/shm && hostname node-{node} && exec "$@"'
        pairs = (f"{name}={value}" for name, value in variables.items())
        return ("unshare", "-m", "-u", "sh", "-c", own, "sh", "env", *pairs)

    def processes(self) -> dict[int, str]:
        """The command lines of the run's processes."""
        mark, found = f"{MARK}={self.mark}".encode(), {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        return found

    def wait_for_ends(self) -> None:
        """Wait until the run's processes are gone, as long as that may take."""
        deadline = time.monotonic() + GONE_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)

    def left(self) -> list[str]:
        """What a run that has ended has left behind."""
        self.wait_for_ends()
        files = [*self.temporary.iterdir(), *self.memory.iterdir()]
        return [*self.processes().values(), *map(str, files)]


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """A place below a folder; what is left there goes with the block."""
    made = Place(folder)
    made.temporary.mkdir()
    made.memory.mkdir()
    try:
        yield made
    finally:
        for pid in made.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        made.wait_for_ends()
        shutil.rmtree(made.memory)


@contextmanager
def busy(processes: int, longest_s: float) -> Iterator[None]:
    """So many processes want a core each, until the block ends."""
    spinning = [
        subprocess.Popen(
            ["timeout", "-s", "KILL", f"{longest_s:g}", "sh", "-c", "while :; do :; done"]
        )
        for _ in range(processes)
    ]
    try:
        yield
    finally:
        for one in spinning:
            one.terminate()
            one.wait()


def paced(ranks: int) -> list[dict[str, Any]]:
    """The faults that make every step long, whichever processes take part."""
    return [
        fault("slow", rank, 1, seconds=PACE_S, incarnation=incarnation)
        for rank in range(ranks)
        for incarnation in range(PACED_INCARNATIONS)
    ]


@dataclass
class Storm:
    """A trial on its run."""

    trial: Trial
    run: ElasticRun
    tasks: list[Process]
    place: Place
    disk: Disk
    net: Network | None
    may_lose: Counter[int] = field(default_factory=Counter)
    """By rank: how many faults may cost a process of it."""
    told: list[str] = field(default_factory=list)
    """What was done at which step."""
    cut: set[int] = field(default_factory=set)
    """The tasks that were cut off."""
    _agents: dict[Blow, int] = field(default_factory=dict)

    def blow(self) -> None:
        """Hit the run as the trial says; what is not taken back when it ends is so then."""
        self.run.wait_for_members(self.trial.ranks)
        self.run.wait_for_step(2)
        begun: list[Blow] = []
        start_s = time.monotonic()
        try:
            for moment in timeline(self.trial):
                while time.monotonic() < start_s + moment.at_s and self._is_under_way():
                    time.sleep(0.02)
                if moment.begins and self._is_under_way():
                    if moment.blow.seconds:
                        begun.append(moment.blow)
                    self._begin(moment.blow)
                elif moment.blow in begun:
                    begun.remove(moment.blow)
                    self._end(moment.blow)
        finally:
            for blow in begun:
                self._end(blow)

    def codes(self) -> list[int | None]:
        """The exit codes of all commands; None of one that has not ended in time."""
        deadline = time.monotonic() + PATIENCE_S
        found: list[int | None] = []
        for process in (self.run.process, *self.tasks):
            try:
                found.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                found.append(None)
        return found

    def healthy_lost(self) -> dict[int, int]:
        """By rank: how often it was lost beyond what the faults explain."""
        return dict(self.lost() - self.may_lose)

    def lost(self) -> Counter[int]:
        """By rank: how often it was lost."""
        return Counter(event["rank"] for event in self.run.events("rank_lost"))

    def _is_under_way(self) -> bool:
        return any(process.poll() is None for process in (self.run.process, *self.tasks))

    def _begin(self, blow: Blow) -> None:
        ranks = self._ranks_of(blow.node)
        whom = "" if blow.kind in OF_THE_DISK else f" of ranks {ranks}"
        self.told.append(f"{blow.kind}{whom} at step {len(self.run.steps())}")
        if blow.kind == "stall the disk":
            self.disk.stall()
        elif blow.kind == "slow syncs":
            self.place.slow.write_text(str(SLOW_MS))
        elif blow.kind == "fill the disk":
            self.disk.fill()
        elif blow.kind == "cut a node":
            assert self.net is not None
            self.may_lose.update(ranks)
            self.cut.add(blow.node)
            self.net.cut(self.net.node(blow.node))
        elif blow.kind in OF_A_NODE and ranks:
            self.may_lose.update(ranks)
            self._hit_agent(blow, ranks[0])
        elif ranks:
            victim = ranks[int(blow.pick * len(ranks))]
            self.may_lose[victim] += 1
            number = signal.SIGKILL if blow.kind == "kill a worker" else signal.SIGSTOP
            with suppress(ProcessLookupError, KeyError):
                self.run.kill(victim, number)

    def _hit_agent(self, blow: Blow, rank: int) -> None:
        with suppress(ProcessLookupError, FileNotFoundError, KeyError):
            self._agents[blow] = self.run.agent(rank)
            killed = blow.kind == "kill an agent"
            os.kill(self._agents[blow], signal.SIGKILL if killed else signal.SIGSTOP)

    def _end(self, blow: Blow) -> None:
        self.told.append(f"end of {blow.kind} at step {len(self.run.steps())}")
        if blow.kind == "stall the disk":
            self.disk.go_on()
        elif blow.kind == "slow syncs":
            self.place.slow.unlink(missing_ok=True)
        elif blow.kind == "fill the disk":
            self.disk.free()
        elif blow.kind == "cut a node" and self.net is not None:
            self.net.heal()
        elif blow.kind == "stop an agent" and blow in self._agents:
            with suppress(ProcessLookupError):
                os.kill(self._agents[blow], signal.SIGCONT)

    def _ranks_of(self, node: int) -> list[int]:
        """The living ranks of a node; of another one where all of it are gone."""
        by_node: dict[str, list[int]] = {}
        for rank, worker in self.run.living().items():
            by_node.setdefault(worker["node"], []).append(rank)
        names = [name for name in sorted(by_node) if self._number_of(name) == node]
        if not names and self.net is None:
            names = sorted(by_node)[:1]
        return sorted(rank for name in names for rank in by_node[name])

    def _number_of(self, name: str) -> int:
        """The number of a node, of its name: HOST-NUMBER."""
        return int(name.rpartition("-")[2])


def start_storm(
    start: Starter,
    trial: Trial,
    where: Place,
    library: Path,
    disk: Disk,
    net: Network | None,
    **sections: Any,
) -> Storm:
    """Start the run of a trial, on one machine or as the tasks of a job."""
    name = f"trial-{trial.number}"
    data, pipeline, tensor = trial.layout
    elastic: dict[str, Any] = {"chaos": paced(trial.ranks)}
    if net is None:
        elastic["local_nodes"] = trial.nodes
    path = start.write(
        name,
        parallel={"data": data, "pipeline": pipeline, "tensor": tensor, "shard": trial.shard},
        checkpoint={"every": 5, "memory_every": 0},
        elastic=elastic,
        **sections,
    )
    inside = [where.launcher(library, disk.folder, node) for node in range(trial.nodes)]
    if net is None:
        run, tasks = start.start(path, name, launcher=inside[0]), []
    else:
        others = range(1, trial.nodes)
        tasks = [start.task(path, name, Task(net, number), inside[number]) for number in others]
        run = start.start(path, name, launcher=inside[0], task=Task(net, 0))
    return Storm(trial, run, tasks, where, disk, net)


def sweep(storm: Storm, library: Path) -> int:
    """Start the command of a run that has ended once more: it finds that all is done. Its exit
    code."""
    launcher = storm.place.launcher(library, storm.disk.folder)
    path = storm.run.root.with_suffix(".toml")
    command = [*launcher, *HOLDFAST, "train", str(path), "--out", str(storm.run.root)]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE_S).returncode
