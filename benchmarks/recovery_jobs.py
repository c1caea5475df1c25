"""The jobs of benchmarks/recovery.py that run holdfast: elastic, and restarted by torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

RANKS = 4
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 100, 600
HANG_TIMEOUT_S = 2.0
_WIDTH = int(os.environ.get("RECOVERY_HIDDEN", "96"))  # of processes of these jobs, too
MODEL = {
    "layers": 4,
    "hidden": _WIDTH,
    "intermediate": _WIDTH * 8 // 3,
    "heads": _WIDTH // 16,
    "kv_heads": _WIDTH // 32,
    "vocab": 320,
}
DENSE = {"family": '"llama"'}
LONG = DENSE | {"intermediate": 3 * MODEL["intermediate"]}
"""A step of it takes about as long as one with experts: on a CPU, experts' few rows are slower."""
EXPERTS = {
    "family": '"mixtral"',
    "experts": 16,
    "experts_per_token": 2,
    "intermediate": MODEL["intermediate"] // 2,
}
"""As much work for a token."""
SEQ_LEN = int(os.environ.get("RECOVERY_SEQ_LEN", "128"))
MICRO_BATCH, MICRO_BATCHES = 2, 8
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


def config_text(
    *, elastic: bool, checkpoint_every: int, family: Mapping[str, object] = DENSE, expert: int = 1
) -> str:
    model = "\n".join(f"{key} = {value}" for key, value in (MODEL | dict(family)).items())
    return f"""
[model]
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
expert = {expert}
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
def holdfast(
    folder: Path, family: Mapping[str, object] = DENSE, expert: int = 1
) -> Iterator[Contestant]:
    path, run = folder / "run.toml", folder / "run"
    path.write_text(config_text(elastic=True, checkpoint_every=0, family=family, expert=expert))
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


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(map(int, found))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
