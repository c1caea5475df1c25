"""A run without training: agents whose workers count steps together, and write down what they did.

A step is a meeting of all members in the generation's store. What each worker did lies in
`RANK.jsonl` of the run's folder, so that tests look at it from outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import Store

from holdfast.elastic.generation import Generation
from holdfast.elastic.hang import HangLimits
from holdfast.elastic.lighthouse import Lighthouse, coordination
from holdfast.elastic.membership import Membership
from holdfast.elastic.quorum_client import MembershipSettings
from holdfast.elastic.worker_spec import WorkerSpec
from holdfast.launch.agent.agent import Agent
from holdfast.launch.agent.restarts import RestartPolicy
from holdfast.launch.agent.settings import AgentSettings
from holdfast.launch.launchers.nodes import run_nodes
from holdfast.launch.processes import die_with
from holdfast.parallel.comm import FlightRecord, Operation
from holdfast.parallel.errors import HoldfastError, PeerLost
from holdfast.parallel.links import new_secret
from support.network.namespaces import enter_network
from support.processes.forked_command import forked

WAIT_S = 120.0
"""How long tests wait for what must come; none depends on how fast it does."""

LOOK_S = 0.01
"""How often a worker looks for the others in a step."""

PACE_S = 0.02
"""Between two steps: demonstrations are about what ends them."""

HANG_S = 2.0
"""The patience of agents with workers that hang."""

PATIENT_MS = 2000
"""The patience with workers that are silent: processes of these tests share a few cores."""


@dataclass(frozen=True)
class Demo:
    """What the workers of a demonstration do."""

    root: str
    steps: int = 0
    """After which they end; 0: never."""
    agree_s: float = 60.0
    """How long they try to agree."""
    store_s: float = 60.0
    """How long an operation of the store, or a step, may take."""


class _Worker:
    def __init__(self, demo: Demo, spec: WorkerSpec, channel: socket.socket) -> None:
        self.demo, self.spec = demo, spec
        self.lost = threading.Event()
        self.step = 0
        self.record = (Path(demo.root) / f"{spec.rank}.jsonl").open("a", buffering=1)
        self.membership = Membership(spec, channel, store_timeout_s=demo.store_s)
        self.membership.on_urgent(lambda event: self.lost.set())

    def write(self, what: str, **fields: Any) -> None:
        line = {"what": what, "time": time.time(), "who": str(self.spec.identity), **fields}
        self.record.write(json.dumps(line) + "\n")

    def run(self) -> int:
        self.write("started", pid=os.getpid())
        urgent = leaving = False
        while True:
            generation = self.agree(urgent=urgent, leaving=leaving)
            if leaving:
                return 3
            try:
                leaving = self.steps(generation)
                urgent = False
            except (PeerLost, RuntimeError) as error:
                self.write("disturbed", error=str(error).splitlines()[0])
                urgent = True
            if self.demo.steps and self.step >= self.demo.steps:
                self.write("finished")
                self.membership.finished()
                return 0

    def agree(self, *, urgent: bool, leaving: bool) -> Generation:
        self.lost.clear()
        self.spec.flight_record.unlink(missing_ok=True)
        generation = self.membership.agree(
            step=self.step,
            phase="step",
            urgent=urgent,
            leaving=leaving,
            timeout_s=self.demo.agree_s,
        )
        self.step = max(member.step for member in generation.members)
        self.write(
            "generation",
            number=generation.number,
            prefix=generation.prefix,
            members=[str(member.identity) for member in generation.members],
            held=[member.held for member in generation.members],
            leaving=[member.rank for member in generation.members if member.leaving],
        )
        return generation

    def steps(self, generation: Generation) -> bool:
        """Until the membership is to change; whether this worker leaves."""
        store = self.membership.store()
        while not self.demo.steps or self.step < self.demo.steps:
            self.misbehave()
            wanted = self.membership.wanted
            own = f"{self.step}/{self.spec.rank}"
            store.set(own, "change" if wanted else "go on")
            keys = [f"{self.step}/{rank}" for rank in generation.ranks]
            deadline = time.monotonic() + self.demo.store_s
            while not store.check(keys):
                self.note_wait(store, generation, since=deadline - self.demo.store_s)
                if self.lost.wait(LOOK_S):
                    raise PeerLost("a member was lost")
                if time.monotonic() > deadline:
                    raise PeerLost("a member is silent")
            votes = store.multi_get(keys)
            self.step += 1
            self.membership.committed(self.step)
            self.write("step", step=self.step, generation=generation.number)
            if b"change" in votes:
                mine = [
                    n for n in wanted if n.kind == "leaving" and n.identity == self.spec.identity
                ]
                return bool(mine)
            time.sleep(PACE_S)
        return False

    def note_wait(self, store: Store, generation: Generation, since: float) -> None:
        """Leave word of a wait that lasts, as communicators do in their records of operations."""
        if time.monotonic() - since > 0.5 and not self.spec.flight_record.exists():
            missing = [r for r in generation.ranks if not store.check([f"{self.step}/{r}"])]
            partial = self.spec.flight_record.with_suffix(".partial")
            partial.write_text(json.dumps([missing, since]))
            partial.replace(self.spec.flight_record)

    def misbehave(self) -> None:
        """Do what a test has asked for by a file of this worker's name."""
        fault = Path(self.demo.root) / f"{self.spec.identity}.fault"
        if fault.exists():
            what = fault.read_text()
            if what == "hold-lock":
                ctypes.PyDLL(None).sleep(60)
            elif what == "exit":
                os._exit(7)
            elif what == "hang":
                time.sleep(60)
            elif what == "start-child":
                fault.unlink()
                self.write("child", pid=subprocess.Popen(["sleep", "60"]).pid)


def demo_record(spec: WorkerSpec) -> FlightRecord:
    """What an agent reads of `note_wait`: the record of a worker whose steps are known."""
    found: list[Operation] = []
    with contextlib.suppress(FileNotFoundError):  # the worker removes it when its wait is over
        missing, since_s = json.loads(spec.flight_record.read_text())
        found = [
            Operation(
                *(rank + 1, "the step's meeting", "receive", "receive", rank, 0, 0, "open"),
                *(since_s, since_s, since_s, math.nan),
            )
            for rank in missing
        ]
    return FlightRecord(spec.rank, 0, 0, 1, 0.0, tuple(found), step_starts_s=(0.1, 0.2))


def demo_main(demo: Demo) -> Callable[[WorkerSpec, socket.socket], int]:
    """What the workers of a demonstration call."""

    def main(spec: WorkerSpec, channel: socket.socket) -> int:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        if (Path(demo.root) / f"{spec.rank}.crash").exists():
            return 1
        worker = _Worker(demo, spec, channel)
        try:
            return worker.run()
        except HoldfastError as error:
            worker.write("gave up", kind=type(error).__name__, error=str(error))
            return error.exit_code

    return main


def run_machine(demo: Demo, nodes: list[dict[str, Any]]) -> None:
    """All nodes of a run on one machine, as a process that starts their agents."""
    die_with(os.getppid())
    root = Path(demo.root)
    os.dup2(os.open(root / "machine.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s agent %(message)s", force=True)
    settings = [AgentSettings(**node, log=lambda rank: root / f"{rank}.log") for node in nodes]
    sys.exit(run_nodes(settings, demo_main(demo), root / "state"))


def run_agent(demo: Demo, settings: dict[str, Any], lighthouse: str, network: str) -> None:
    """One agent, as a process."""
    die_with(os.getppid())
    if network:
        enter_network(network)
    root = Path(demo.root)
    os.dup2(os.open(root / f"{settings['node']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s agent %(message)s", force=True)
    agent = Agent(AgentSettings(**settings, log=lambda rank: root / f"{rank}.log"), demo_main(demo))
    sys.exit(agent.run(lighthouse))


def run_lighthouse(host: str, port: int, network: str, key: bytes) -> None:
    """A Lighthouse, as a process."""
    die_with(os.getppid())
    if network:
        enter_network(network)
    _server = Lighthouse(host, key, port, heartbeat_timeout_ms=PATIENT_MS)
    signal.pause()


coordination()  # before the fork server forks, which imports this module


class Run:
    """A demonstration as a test drives it: nodes, a Lighthouse, faults, and what the workers
    wrote.
    """

    def __init__(
        self, root: Path, world_size: int, hub: tuple[str, str] = ("127.0.0.1", ""), **demo: Any
    ) -> None:
        """Args:
        hub: address and network namespace of the Lighthouse.
        """
        self.root, self.world_size = root, world_size
        self._host, self._network = hub
        self.demo = Demo(str(root), **demo)
        self.nodes: dict[str, BaseProcess] = {}
        self._read: dict[int, tuple[int, list[dict[str, Any]]]] = {}
        self.min_ranks = 1
        self.heartbeat_timeout_ms = PATIENT_MS
        self.secret = new_secret()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.lighthouse = self.start_lighthouse()

    def start_lighthouse(self) -> BaseProcess:
        key = self._membership.lighthouse_key
        process = forked(run_lighthouse, self._host, self._port, self._network, key)
        process.daemon = True
        process.start()
        return process

    def start_node(
        self, node: str, ranks: tuple[int, ...], network: str = "", **settings: Any
    ) -> BaseProcess:
        given = self._settings(node, ranks, **settings)
        address = f"holdfast://{self._host}:{self._port}"
        process = forked(run_agent, self.demo, given, address, network)
        process.start()
        self.nodes[node] = process
        return process

    def start_machine(self, nodes: dict[str, tuple[int, ...]]) -> BaseProcess:
        """All nodes below one process, with a Lighthouse of its own."""
        given = [self._settings(node, ranks) for node, ranks in nodes.items()]
        process = forked(run_machine, self.demo, given)
        process.start()
        self.nodes["machine"] = process
        return process

    @property
    def _membership(self) -> MembershipSettings:
        return MembershipSettings(
            "",
            "demo",
            self.world_size,
            self.min_ranks,
            heartbeat_timeout_ms=self.heartbeat_timeout_ms,
            hang_timeout_s=HANG_S,
            secret=self.secret,
        )

    def _settings(self, node: str, ranks: tuple[int, ...], **settings: Any) -> dict[str, Any]:
        return {
            "membership": self._membership,
            "ranks": ranks,
            "node": node,
            "limits": HangLimits(HANG_S),
            "exit_s": 10.0,
            "restarts": RestartPolicy(limit=3, first_s=0.01),
            "read_record": demo_record,
            **settings,
        }

    def records(self, rank: int, what: str = "") -> list[dict[str, Any]]:
        """What a rank's workers wrote, of one kind or all. Tests ask fifty times a second."""
        path = self.root / f"{rank}.jsonl"
        read, found = self._read.setdefault(rank, (0, []))
        if path.exists() and path.stat().st_size > read:
            with path.open("rb") as file:
                file.seek(read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            found += map(json.loads, whole.splitlines())
            self._read[rank] = read + len(whole), found
        return [record for record in found if not what or record["what"] == what]

    def pid(self, rank: int) -> int:
        """Of the newest process of a rank."""
        return wait_for(lambda: self.records(rank, "started"), f"rank {rank} to start")[-1]["pid"]

    def generation(self, rank: int) -> dict[str, Any]:
        """The newest that a rank has entered, or an empty one."""
        return (self.records(rank, "generation") or [{"number": 0, "members": []}])[-1]

    def reach(self, rank: int, members: list[str], *, after: int = 0) -> dict[str, Any]:
        """Wait until a rank has committed a step in a generation of these members, past a
        number.
        """

        def there() -> dict[str, Any] | None:
            now = self.generation(rank)
            stepped = any(r["generation"] == now["number"] for r in self.records(rank, "step"))
            return now if now["members"] == members and now["number"] > after and stepped else None

        return wait_for(there, f"rank {rank} to train with {members}", self.describe)

    def step(self, rank: int) -> int:
        return (self.records(rank, "step") or [{"step": 0}])[-1]["step"]

    def more_steps(self, rank: int, count: int = 10) -> None:
        target = self.step(rank) + count
        wait_for(lambda: self.step(rank) >= target, f"rank {rank} to go on", self.describe)

    def fault(self, identity: str, what: str) -> None:
        (self.root / f"{identity}.fault").write_text(what)

    def exit_code(self, node: str) -> int | None:
        self.nodes[node].join(WAIT_S)
        return self.nodes[node].exitcode

    def describe(self) -> str:
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-8:])
            for path in sorted(self.root.glob("*.*l*"))
            if path.suffix in (".log", ".jsonl")
        )

    def close(self) -> None:
        for process in (*self.nodes.values(), self.lighthouse):
            process.kill()
            process.join()

    def check_history(self, ranks: range) -> None:
        """No generation had two memberships, numbers only went up, and every step is in one
        history.
        """
        values: dict[int, str] = {}
        for rank in ranks:
            numbers: dict[str, int] = {}
            for record in self.records(rank, "generation"):
                number, who = record["number"], record["who"]
                assert values.setdefault(number, record["prefix"]) == record["prefix"]
                assert number > numbers.get(who, 0)
                numbers[who] = number


@contextmanager
def demonstration(root: Path, world_size: int, **demo: Any) -> Iterator[Run]:
    """A run that is ended with the block."""
    run = Run(root, world_size, **demo)
    try:
        yield run
    finally:
        run.close()


def wait_for(
    condition: Callable[[], Any], what: str, describe: Callable[[], str] = lambda: ""
) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}\n{describe()}")


def parent_of(pid: int) -> int:
    """The process that forked another."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
