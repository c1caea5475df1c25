"""A worker of four is killed, or stopped, at random instants: how long until steps are committed
again.

The same shape of model and batch under

- holdfast, `elastic.enabled`: four data-parallel ranks, exact mode, one shadow per block;
- torchft, `manager.allreduce` over gloo: four replicas, each restarted when it has died, with the
  same heartbeat settings, and plain AdamW (its DDP wrapper fails on torch 2.13 when a peer dies);
- torchrun --max-restarts: holdfast's plain workers with a checkpoint every 5 steps, loaded at each
  restart.

An observer outside polls every 2 ms which step has been committed. What is reported of a fault is
the longest of the three gaps that follow it (fault to next commit, then from commit to commit),
less the median time of a step: so that a step that was as good as done when the fault came does not
count as recovery.

    python benchmarks/recovery.py [--faults 8] [--json out.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from harness import Measurement, report

RANKS = 4
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 100, 600
TORCHFT_JOIN_TIMEOUT_MS = 1000
"""With the 100 ms that holdfast uses, torchft's replicas, which ask for a quorum in every step,
leave the slower of them out again and again."""
HANG_TIMEOUT_S = 2.0
MODEL = {"layers": 4, "hidden": 96, "intermediate": 256, "heads": 6, "kv_heads": 3, "vocab": 320}
SEQ_LEN, MICRO_BATCH, MICRO_BATCHES = 128, 2, 8
UNDISTURBED_STEPS = 5
LONGEST_S = 90.0


class Observer:
    """Notes when each step has been committed, by the newest line of any of some files."""

    def __init__(self, files: Callable[[], list[Path]], step: Callable[[bytes], int]) -> None:
        self.commits: list[tuple[float, int]] = []
        self._files, self._step = files, step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        sizes: dict[Path, int] = {}
        newest = 0
        while not self._stop.wait(0.002):
            for path in self._files():
                size = path.stat().st_size if path.exists() else 0
                if size == sizes.get(path, 0):
                    continue
                sizes[path] = size
                lines = path.read_bytes().split(b"\n")[:-1]
                step = self._step(lines[-1]) if lines else 0
                if step > newest:
                    newest = step
                    self.commits.append((time.perf_counter(), step))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def step_s(self) -> float:
        times = [at for at, _ in self.commits]
        return statistics.median(b - a for a, b in pairwise(times))

    def wait_for(self, count: int) -> None:
        """Until so many more steps have been committed."""
        wanted, deadline = len(self.commits) + count, time.monotonic() + LONGEST_S
        while len(self.commits) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {count} steps within {LONGEST_S:g} s")
            time.sleep(0.01)

    def longest_between(self, begin: float, end: float) -> float:
        """The longest time without a commit."""
        times = [begin, *(at for at, _ in self.commits if begin < at < end), end]
        return max(b - a for a, b in pairwise(times))

    def longest_gap(self, fault_at: float) -> float:
        after = [at for at, _ in self.commits if at > fault_at][:3]
        return max(b - a for a, b in pairwise([fault_at, *after]))


@dataclass
class Contestant:
    """A job that is under way."""

    observer: Observer
    workers: Callable[[], list[int]]
    """The processes that may be hit, when all take part."""
    replace: Callable[[], None] = field(default=lambda: None)
    """Restarts what does not restart by itself."""


def config_text(*, elastic: bool, checkpoint_every: int) -> str:
    model = "\n".join(f"{key} = {value}" for key, value in MODEL.items())
    return f"""
[model]
family = "llama"
{model}
[data]
kind = "text"
tokenizer = "bytes"
[train]
steps = 100000
seq_len = {SEQ_LEN}
global_batch = {MICRO_BATCH * MICRO_BATCHES}
micro_batch = {MICRO_BATCH}
[parallel]
data = {RANKS}
[checkpoint]
every = {checkpoint_every}
keep = 2
[log]
every = 1000000
tensorboard = false
[elastic]
enabled = {str(elastic).lower()}
local_nodes = {RANKS}
heartbeat_ms = {HEARTBEAT_MS}
heartbeat_timeout_ms = {HEARTBEAT_TIMEOUT_MS}
hang_timeout_s = {HANG_TIMEOUT_S}
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKIO_WORKER_THREADS": "1", "RUST_LOG": "warn"}


def metrics_step(line: bytes) -> int:
    return int(json.loads(line)["step"])


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def undisturbed(
    process: subprocess.Popen[bytes], run: Path, workers: Callable[[], list[int]]
) -> Iterator[Contestant]:
    """A run that writes metrics.jsonl, once it has trained for a while; ended afterwards."""
    with ended(process):
        observer = Observer(lambda: [run / "metrics.jsonl"], metrics_step)
        observer.wait_for(UNDISTURBED_STEPS)
        try:
            yield Contestant(observer, workers)
        finally:
            observer.close()


@contextlib.contextmanager
def holdfast(folder: Path) -> Iterator[Contestant]:
    path, run = folder / "run.toml", folder / "run"
    path.write_text(config_text(elastic=True, checkpoint_every=0))
    command = [
        *(sys.executable, "-m", "holdfast.launch.cli", "train"),
        str(path),
        "--out",
        str(run),
    ]
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())

    def workers() -> list[int]:
        """All but rank 0's when the newest generation has all ranks."""
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        plans = [event["plan"] for event in events if "plan" in event]
        placed = (
            {r for stage in plans[-1]["stages"] for ranks in stage for r in ranks} if plans else {}
        )
        newest = {e["rank"]: e["pid"] for e in events if e["event"] == "worker_started"}
        return [newest[rank] for rank in range(1, RANKS)] if len(placed) == RANKS else []

    with undisturbed(process, run, workers) as contestant:
        yield contestant


@contextlib.contextmanager
def torchrun(folder: Path) -> Iterator[Contestant]:
    path, run = folder / "run.toml", folder / "run"
    path.write_text(config_text(elastic=False, checkpoint_every=5))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)),
        *("--max-restarts", "100", "--monitor-interval", "0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"),
        *("-m", "holdfast.trainer", str(path), "--out", str(run)),
    ]
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())

    def workers() -> list[int]:
        return children(process.pid)[1:]

    with undisturbed(process, run, workers) as contestant:
        yield contestant


@contextlib.contextmanager
def torchft(folder: Path) -> Iterator[Contestant]:
    os.environ.setdefault("RUST_LOG", "warn")
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=1,
        join_timeout_ms=TORCHFT_JOIN_TIMEOUT_MS,
        quorum_tick_ms=10,
        heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS,
    )
    address = f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
    output = (folder / "output.txt").open("wb")
    replicas: dict[int, subprocess.Popen[bytes]] = {}
    starts = dict.fromkeys(range(RANKS), 0)

    def start(number: int) -> None:
        starts[number] += 1
        log = folder / f"commits-{number}-{starts[number]}"
        command = [sys.executable, __file__, "--replica", str(number), "--commits", str(log)]
        replicas[number] = subprocess.Popen(
            [*command, "--lighthouse", address], stdout=output, stderr=output, env=environment()
        )

    def replace() -> None:
        for number, process in replicas.items():
            if process.poll() is not None:
                start(number)

    def members() -> int:
        """Of the newest step that anybody has committed."""
        newest = (0, 0)
        for log in folder.glob("commits-*"):
            lines = log.read_bytes().split(b"\n")[:-1]
            if lines:
                step, count = lines[-1].split()
                newest = max(newest, (int(step), int(count)))
        return newest[1]

    def workers() -> list[int]:
        if members() != RANKS:
            return []
        return [replicas[number].pid for number in range(1, RANKS)]

    for number in range(RANKS):
        start(number)
    try:
        observer = Observer(
            lambda: list(folder.glob("commits-*")), lambda line: int(line.split()[0])
        )
        observer.wait_for(UNDISTURBED_STEPS)
        try:
            yield Contestant(observer, workers, replace)
        finally:
            observer.close()
    finally:
        for process in replicas.values():
            process.kill()
            process.wait()
        server.shutdown()
        output.close()


def replica(number: int, lighthouse: str, commits: Path) -> None:
    """One torchft replica: trains for ever, and writes a line `step members` for each commit."""
    import torch
    from torch.distributed import TCPStore
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=MODEL["vocab"],
            hidden_size=MODEL["hidden"],
            intermediate_size=MODEL["intermediate"],
            num_hidden_layers=MODEL["layers"],
            num_attention_heads=MODEL["heads"],
            num_key_value_heads=MODEL["kv_heads"],
            attn_implementation="eager",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def state() -> dict[str, object]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load(found: dict) -> None:
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=HANG_TIMEOUT_S)),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=1,
        timeout=timedelta(seconds=HANG_TIMEOUT_S),
        quorum_timeout=timedelta(seconds=10),
        connect_timeout=timedelta(seconds=5),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica-{number}",
        hostname="127.0.0.1",
        heartbeat_interval=timedelta(milliseconds=HEARTBEAT_MS),
    )
    generator = torch.Generator().manual_seed(number)
    with commits.open("w", buffering=1) as log:
        while True:
            optimizer.zero_grad()
            manager.start_quorum()
            for _ in range(MICRO_BATCHES // RANKS):
                tokens = torch.randint(
                    0, MODEL["vocab"], (MICRO_BATCH, SEQ_LEN), generator=generator
                )
                model(input_ids=tokens, labels=tokens).loss.backward()
            flat = torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
            manager.allreduce(flat).wait()
            start = 0
            for parameter in model.parameters():
                if parameter.grad is not None:
                    stop = start + parameter.numel()
                    parameter.grad.copy_(flat[start:stop].view_as(parameter))
                    start = stop
            if manager.should_commit():
                optimizer.step()
                log.write(f"{manager.current_step()} {manager.num_participants()}\n")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(map(int, found))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(
    job: Contestant, faults: int, number: signal.Signals, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds that each fault has cost beyond a step, and that each replacement's arrival has."""
    rng = random.Random(seed)
    found: list[float] = []
    joins: list[float] = []
    waiting_since: float | None = None
    deadline = time.monotonic() + LONGEST_S
    while len(found) < faults:
        workers = job.workers()
        if not workers:
            if time.monotonic() > deadline:
                raise TimeoutError("not all workers take part again")
            time.sleep(0.05)
            continue
        job.observer.wait_for(UNDISTURBED_STEPS)
        step_s = job.observer.step_s()
        if waiting_since is not None:
            gap = job.observer.longest_between(waiting_since, time.perf_counter())
            joins.append(gap - step_s)
        time.sleep(step_s * rng.random())
        victim = rng.choice(job.workers() or workers)
        fault_at = time.perf_counter()
        os.kill(victim, number)
        job.observer.wait_for(3)
        found.append(job.observer.longest_gap(fault_at) - step_s)
        if number == signal.SIGSTOP:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
        waiting_since = time.perf_counter()
        job.replace()
        deadline = time.monotonic() + LONGEST_S
    return tuple(found), tuple(joins)


CONTESTANTS = {"holdfast": holdfast, "torchft": torchft, "torchrun restart": torchrun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=8)
    parser.add_argument("--json", default=None)
    parser.add_argument("--only", default="")
    parser.add_argument("--stop-only", action="store_true", help="leave out the killed workers")
    parser.add_argument("--replica", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--lighthouse", default="", help=argparse.SUPPRESS)
    parser.add_argument("--commits", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.replica is not None:
        replica(given.replica, given.lighthouse, Path(given.commits))
        return
    for kind, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        if given.stop_only and number == signal.SIGKILL:
            continue
        rows: list[Measurement] = []
        arrivals: list[Measurement] = []
        steps: dict[str, float] = {}
        for name, start in CONTESTANTS.items():
            if given.only not in name or (number == signal.SIGSTOP and name != "holdfast"):
                # torchrun waits for ever; torchft's replicas did not all come back in time
                continue
            with tempfile.TemporaryDirectory() as folder, start(Path(folder)) as job:
                lost, joined = measure(job, given.faults, number, seed=3)
                rows.append(Measurement(name, lost))
                if joined and name != "torchrun restart":
                    arrivals.append(Measurement(f"{name}: a replacement joins", joined))
                steps[name] = job.observer.step_s()
        medians = {row.name: row.median_s for row in rows}
        report(
            f"one of {RANKS} workers is {kind}: time lost",
            [*rows, *arrivals],
            {name: medians["torchft"] for name in medians} if "torchft" in medians else {},
            json_path=given.json and f"{given.json.removesuffix('.json')}-{kind}.json",
            note="ratio: to torchft; a step takes "
            + ", ".join(f"{1e3 * steps[name]:.0f} ms ({name})" for name in steps),
        )


if __name__ == "__main__":
    main()
