"""Elastic runs that tests start with the command itself, disturb from outside, and read
afterwards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from holdfast.elastic.faults import Fault, ask_for
from holdfast.trainer.config.loading import dump_toml
from support.network.elastic_network import Network
from support.processes.forked_command import ForkedCommand
from support.runs.small_runs import make_config

HOLDFAST = (sys.executable, "-m", "holdfast.launch.cli")
PATIENT_MS = 2000
"""Many processes share a few cores in these tests: one that is not scheduled for a while is not
lost.
"""
LONGEST_S = 120.0
"""How long a run of these tests may take before it counts as hung; none depends on how fast it
is.
"""

Process = subprocess.Popen[str] | ForkedCommand


Undisturbed = Callable[..., dict[str, Any]]
"""(sections) -> what a run of fixed ranks gives."""


@dataclass
class ElasticRun:
    """One run of the command in a folder of its own."""

    root: Path
    process: Process
    _read: dict[str, tuple[tuple[int, int], list[dict[str, Any]]]] = field(default_factory=dict)
    """By the name of a file: its size and time when it was last read, and its lines then. Those who
    wait look fifty times a second, and plans take long to parse."""

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """What the run has recorded so far; of one kind, or all."""
        return [event for event in self._lines("events.jsonl") if name in ("", event["event"])]

    def steps(self) -> list[dict[str, Any]]:
        return list(self._lines("metrics.jsonl"))

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a file."""
        path = self.root / name
        try:
            now = path.stat()
        except FileNotFoundError:
            return []
        state = now.st_size, now.st_mtime_ns
        if name not in self._read or self._read[name][0] != state:
            lines = path.read_bytes().split(b"\n")[:-1]
            self._read[name] = state, [json.loads(line) for line in lines]
        return self._read[name][1]

    def living(self) -> dict[int, dict[str, Any]]:
        """The newest worker of each rank that has a process: its `worker_started` event."""
        found: dict[int, dict[str, Any]] = {}
        for event in self.events("worker_started"):
            if Path(f"/proc/{event['pid']}").exists():
                found[event["rank"]] = event
        return found

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LONGEST_S
        while not condition():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited in vain until {what}:\n{self.output()}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: len(self.steps()) >= step, f"step {step}")

    def members(self) -> int:
        """How many ranks take part in the newest generation; 0 before there is one."""
        changes = [e for e in self.events() if "plan" in e]
        if not changes:
            return 0
        plan = changes[-1]["plan"]
        return sum(len(ranks) for stage in plan["stages"] for ranks in stage) + len(plan["spares"])

    def wait_for_members(self, count: int) -> None:
        """Until the newest generation has so many ranks."""
        self.wait_until(lambda: self.members() == count, f"{count} ranks take part")

    def pace(self, seconds: float, rank: int = 0) -> None:
        """Make each further step of a rank's first process take at least so long."""
        slow = Fault("slow", rank, 0, seconds=seconds)
        ask_for(self.root / "chaos.jsonl", slow)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.living()[rank]["pid"], number)

    def agent(self, rank: int) -> int:
        """The process of the agent of a rank's node: the parent of what started the worker."""
        return _parent(_parent(self.living()[rank]["pid"]))

    def output(self) -> str:
        return (self.root.parent / f"{self.root.name}.txt").read_text()

    def finish(self, timeout_s: float = LONGEST_S) -> int:
        """Wait for the end; the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the run hangs:\n{self.output()}") from None

    def bits(self) -> dict[str, Any]:
        """What must be equal: every step's loss and gradient norm, and the parameters at the
        end.
        """
        return {
            "steps": [(s["step"], s["loss_hex"], s["grad_norm_hex"]) for s in self.steps()],
            "digest": [e["parameter_digest"] for e in self.events("run_finished")],
        }


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@dataclass(frozen=True, slots=True)
class Task:
    """A command as Slurm would run it as a task, on a node of a network."""

    net: Network
    number: int

    @property
    def network(self) -> str:
        """The network namespace of its node."""
        return self.net.name(self.net.node(self.number))

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm, and the script of a job, would set."""
        number, tasks = str(self.number), str(self.net.size)
        return {
            **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": tasks},
            **{"SLURM_PROCID": number, "SLURM_LOCALID": "0", "SLURM_NODEID": number},
            **{"MASTER_ADDR": self.net.address(self.net.node(0)), "MASTER_PORT": "29400"},
        }


@dataclass
class Starter:
    """Starts runs below one folder, and ends what is left of them."""

    folder: Path
    before: str = ""
    """`module:function`, which each command's process calls first."""
    command: Sequence[str] = HOLDFAST
    """What a launcher starts."""
    runs: list[ElasticRun] = field(default_factory=list)
    _others: list[Process] = field(default_factory=list)

    def __call__(self, *, name: str = "", **sections: dict[str, Any]) -> ElasticRun:
        sections = {"train": {"steps": 30}, **sections}
        sections["elastic"] = {"local_nodes": 2, **sections.get("elastic", {})}
        name = name or f"run-{len(self.runs)}"
        return self.start(self.write(name, **sections), name)

    def write(self, name: str, **sections: dict[str, Any]) -> Path:
        """The file of an elastic run's configuration."""
        quiet = {"tensorboard": False, "every": 1000, **sections.pop("log", {})}
        own = {"enabled": True, "heartbeat_timeout_ms": PATIENT_MS}
        elastic = {**own, **sections.pop("elastic", {})}
        path = self.folder / f"{name}.toml"
        path.write_text(dump_toml(make_config(log=quiet, elastic=elastic, **sections)))
        return path

    def start(
        self,
        path: Path,
        name: str,
        *arguments: str,
        launcher: Sequence[str] = (),
        task: Task | None = None,
    ) -> ElasticRun:
        out = ("--out", str(self.folder / name))
        process = self._start(name, ("train", str(path), *out, *arguments), launcher, task)
        self.runs.append(ElasticRun(self.folder / name, process))
        return self.runs[-1]

    def task(self, path: Path, name: str, task: Task, inside: Sequence[str] = ()) -> Process:
        """Another task of a run that `start` begins with task 0. Its command runs `inside`."""
        arguments = ("train", str(path), "--out", str(self.folder / name))
        self._others.append(self._start(f"{name}-task-{task.number}", arguments, inside, task))
        return self._others[-1]

    def replay(self, run: ElasticRun) -> ElasticRun:
        """The changes of a run once more."""
        name = f"{run.root.name}-again"
        process = self._start(name, ("replay", str(run.root), "--out", str(self.folder / name)))
        self.runs.append(ElasticRun(self.folder / name, process))
        return self.runs[-1]

    def join(self, run: ElasticRun, ranks: int = 1, launcher: Sequence[str] = ()) -> Process:
        """Another node for a run, on this machine."""
        name = f"{run.root.name}-joined-{len(self._others)}"
        arguments = ("join", str(run.root), "--ranks", str(ranks))
        self._others.append(self._start(name, arguments, launcher))
        return self._others[-1]

    def _start(
        self,
        name: str,
        arguments: Sequence[str],
        launcher: Sequence[str] = (),
        task: Task | None = None,
    ) -> Process:
        path, environment = self.folder / f"{name}.txt", {**os.environ, "OMP_NUM_THREADS": "1"}
        if task is not None:
            environment.update(task.environment)
        if not launcher:
            network = "" if task is None else task.network
            return ForkedCommand(arguments, path, environment, before=self.before, network=network)
        there = () if task is None else ("ip", "netns", "exec", task.network)
        path.unlink(missing_ok=True)
        with path.open("a") as output:  # a launcher's processes may open it again
            return subprocess.Popen(
                [*there, *launcher, *self.command, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )

    def close(self) -> None:
        for process in (*(run.process for run in self.runs), *self._others):
            if process.poll() is None:
                process.kill()
                process.wait()


def bits_of(result: dict[str, Any]) -> dict[str, Any]:
    """What `ElasticRun.bits` gives, of a training with `small_runs`."""
    steps = zip(result["losses"], result["norms"], strict=True)
    return {
        "steps": [(n + 1, loss, norm) for n, (loss, norm) in enumerate(steps)],
        "digest": [result["digest"]],
    }


def pace(config: dict[str, Any], seconds: float, rank: int = 0) -> dict[str, Any]:
    """The [elastic] keys that make every step take at least so long, so that others have time to
    join.
    """
    slow = {"fault": "slow", "rank": rank, "step": 1, "seconds": seconds}
    return {**config, "chaos": [*config.get("chaos", []), slow]}


def fault(kind: str, rank: int, step: int, phase: str = "compute", **more: Any) -> dict[str, Any]:
    return {"fault": kind, "rank": rank, "step": step, "phase": phase, **more}


def undisturbed(sections: dict[str, Any]) -> dict[str, Any]:
    """The same configuration for `small_runs`: fixed ranks."""
    return msgspec.to_builtins(make_config(**sections))


def random_kills(run: ElasticRun, seed: int, *, members: int, gap_s: float) -> Iterator[int]:
    """Kill one random rank after the other, each time once all `members` take part again, until
    the end.
    """
    rng = random.Random(seed)
    while run.process.poll() is None:
        time.sleep(gap_s * rng.random())
        living = run.living()
        if len(living) < members or run.members() < members:
            continue
        rank = rng.choice(sorted(living))
        try:
            os.kill(living[rank]["pid"], signal.SIGKILL)
        except ProcessLookupError:
            continue
        yield rank
