"""Offloaded activations beside nothing, save_on_cpu, recomputation and a slow drive: memory and step time.

One process per contestant, which take turns step by step; a Llama of 24 layers. Memory is what a step takes at
most above what was taken before the first: in use (of the allocator, sampled every millisecond of a step that
is not timed) and, on a CPU, the resident set; on a GPU what torch's allocator gave out. Before anything is
timed, all contestants' gradients are compared bit by bit.

Contestants that offload have the heap that `holdfast train` gives them (docs/offload.md), the others that of
every process.

    python benchmarks/offload.py --folder /nvme [--device cuda] [--hidden 512] [--json out.json]
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

import torch
from rich.console import Console
from rich.table import Table

from harness import machine
from holdfast.parallel.offload import compact_heap_environment
from holdfast.parallel.offload.disk_store import DiskStore
from holdfast.trainer.config import RunConfig
from holdfast.trainer.opening import open_training
from holdfast.trainer.training import Training
from holdfast.trainer.world import local_world
from small_runs import make_config

SSD = {"offload": {"activations": "ssd"}}
CONTESTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {},
    "ssd": SSD,
    "ssd at a quarter of the rate": SSD,
    "ssd and selective recompute": SSD | {"train": {"recompute": "selective"}},
    "save_on_cpu": {},
    "selective recompute": {"train": {"recompute": "selective"}},
    "full recompute": {"train": {"recompute": "full"}},
}
TORCHTUNE = "torchtune OffloadActivations"
"""Run where torchtune is installed and its context can be made; else it is said why not."""
SHAPES: dict[str, dict[str, int]] = {
    "small": {},
    "large": {"layers": 8, "hidden": 512, "seq_len": 512},
}
"""Of models; "large" has twice the operations for a byte."""
OFFLOADED = {name for name, sections in CONTESTANTS.items() if "offload" in sections}
ON_GPU = {"host": {"offload": {"activations": "host"}}}
MIB = 2**20
_MEMORY_STEPS = 2


def torchtune_obstacle() -> str:
    """Why torchtune's activation offload does not run here; empty where it does."""
    try:
        from torchtune.training import OffloadActivations  # pyrefly: ignore[missing-import]

        OffloadActivations()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def configuration(args: argparse.Namespace, name: str) -> RunConfig:
    sections = (CONTESTANTS | ON_GPU).get(name, {})
    offload = dict(sections.get("offload", {}))
    if offload.get("activations") == "ssd":
        offload["path"] = args.folder
    if name.endswith("rate"):
        offload["limit_mib_per_s"] = args.limit
    return make_config(
        model={
            "layers": args.layers,
            "hidden": args.hidden,
            "intermediate": args.hidden * 11 // 4,
            "heads": max(1, args.hidden // 64),
            "kv_heads": max(1, args.hidden // 64),
            "vocab": args.vocab,
            "dropout": 0.0,
            "max_seq_len": max(2048, args.seq_len),
        },
        train={
            "seq_len": args.seq_len,
            "global_batch": args.micro_batch * args.micro_batches,
            "micro_batch": args.micro_batch,
            "steps": 1000,
            "device": args.device,
            "precision": args.precision,
            "threads_per_rank": args.threads,
            **sections.get("train", {}),
        },
        optimizer={"block_elements": 1048576},
        offload=offload,
    )


class Memory:
    """What is in use and resident above what was when it was made; bytes."""

    def __init__(self, device: torch.device, training: Training) -> None:
        self._device, self._training = device, training
        self._before = (self._in_use(), _of_status("VmRSS"))
        self._highest = 0
        self._ended = threading.Event()

    def _in_use(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated()
        offloader = self._training.offloader
        store = None if offloader is None else offloader._store
        read = store.memory.room_bytes if isinstance(store, DiskStore) else 0
        found = _mallinfo()
        return found.uordblks + found.hblkhd + read

    def highest(self, step: Callable[[], None]) -> tuple[int, int]:
        """The highest in use and resident memory of a step."""
        Path("/proc/self/clear_refs").write_text("5")
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            in_use = torch.cuda.max_memory_allocated()
        else:
            in_use = self._sampled(step)
        return in_use - self._before[0], _of_status("VmHWM") - self._before[1]

    def _sampled(self, step: Callable[[], None]) -> int:
        self._ended.clear()
        self._highest = 0
        thread = threading.Thread(target=self._sample)
        thread.start()
        step()
        self._ended.set()
        thread.join()
        return self._highest

    def _sample(self) -> None:
        while not self._ended.wait(0.001):
            self._highest = max(self._highest, self._in_use())


class _MallocInformation(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            [
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            ]
        )
    ]


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = _MallocInformation


def _of_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def gradient_digest(training: Training) -> str:
    sums = training.accumulator.sums.cpu().contiguous()
    return hashlib.sha256(sums.view(torch.uint8).numpy().tobytes()).hexdigest()


def work(args: argparse.Namespace) -> None:
    """One contestant: a step per line that comes in, its figures as a line out."""
    config = configuration(args, args.work)
    training = open_training(config, local_world(0, 1), torch.distributed.HashStore())
    memory = Memory(training.device, training)

    def step() -> None:
        around: AbstractContextManager[Any] = nullcontext()
        if args.work == "save_on_cpu":
            around = torch.autograd.graph.save_on_cpu(pin_memory=args.device == "cuda")
        if args.work == TORCHTUNE:
            from torchtune.training import OffloadActivations  # pyrefly: ignore[missing-import]

            around = OffloadActivations()
        with around:
            training.compute(number)
        if training.device.type == "cuda":
            torch.cuda.synchronize()

    for number, line in enumerate(sys.stdin):
        figures: dict[str, Any] = {}
        if line.strip() == "memory":
            figures["in_use"], figures["resident"] = memory.highest(step)
        else:
            start, processor = time.perf_counter(), time.process_time()
            step()
            figures["seconds"] = time.perf_counter() - start
            figures["processor"] = time.process_time() - processor
        if number == 0:
            figures["digest"] = gradient_digest(training)
        if training.offloader is not None:
            last = training.offloader.last_step
            figures |= {
                "eligible": last.eligible_bytes,
                "sent": last.sent_bytes,
                "waited": last.waited_s,
                "rate": last.bytes_per_s,
                "share": last.share,
            }
        print(json.dumps(figures), flush=True)


class Contestant:
    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.steps: list[dict[str, Any]] = []
        heap = compact_heap_environment(os.environ) if name in OFFLOADED else {}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--work", name],
            env={**os.environ, **heap},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self, what: str = "time") -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with {self._process.wait()}")
        self.steps.append(json.loads(line))
        return self.steps[-1]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(args: argparse.Namespace, names: list[str], arguments: list[str]) -> dict[str, Any]:
    """All contestants, in turn, one step each per round."""
    contestants = {name: Contestant(name, arguments) for name in names}
    digests = {name: contestant.step()["digest"] for name, contestant in contestants.items()}
    assert len(set(digests.values())) == 1, digests
    for number in range(args.warm_up - 1 + args.repetitions):
        for contestant in contestants.values():
            contestant.step("time")
            if number < args.warm_up - 1:
                contestant.steps.clear()
    for contestant in contestants.values():
        for _ in range(_MEMORY_STEPS):
            contestant.step("memory")
        contestant.close()
    return {name: contestant.steps for name, contestant in contestants.items()}


def split(steps: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Timed steps, and those whose memory was measured."""
    return [s for s in steps if "seconds" in s], [s for s in steps if "in_use" in s]


def table(results: dict[str, list[dict[str, Any]]], title: str) -> list[dict[str, Any]]:
    shown = Table(title=title)
    columns = ("contestant", "step s", "min..max", "x nothing", "cpu s", "in use MiB", "saved")
    for column in (*columns, "resident MiB", "saved", "sent MiB", "waited s", "MiB/s", "share"):
        shown.add_column(column, justify="left" if column == "contestant" else "right")
    base, base_memory = split(results["nothing"])
    highest = {key: max(s[key] for s in base_memory) for key in ("in_use", "resident")}
    rows = []
    for name, steps in results.items():
        timed, memory = split(steps)
        times = [step["seconds"] for step in timed]
        # Of the same round: what disturbs the machine hits all contestants of a round alike.
        ratios = [s["seconds"] / b["seconds"] for s, b in zip(timed, base, strict=True)]
        last = timed[-1]
        row: dict[str, Any] = {
            "contestant": name,
            "step_s": statistics.median(times),
            "times_s": times,
            "ratio": statistics.median(ratios),
            "processor_s": statistics.median(step["processor"] for step in timed),
            "last": last,
        }
        for key, without in highest.items():
            row[key] = max(step[key] for step in memory)
            row[f"{key}_saved"] = 1 - row[key] / without
        rows.append(row)
        sent = (
            (
                f"{last['sent'] / MIB:,.0f}/{last['eligible'] / MIB:,.0f}",
                f"{last['waited']:.3f}",
                f"{last['rate'] / MIB:,.0f}",
                f"{last['share']:.2f}",
            )
            if "sent" in last
            else ("", "", "", "")
        )
        shown.add_row(
            name,
            f"{row['step_s']:.3f}",
            f"{min(times):.3f}..{max(times):.3f}",
            f"{row['ratio']:.3f}",
            f"{row['processor_s']:.2f}",
            f"{row['in_use'] / MIB:,.0f}",
            f"{row['in_use_saved']:.0%}",
            f"{row['resident'] / MIB:,.0f}",
            f"{row['resident_saved']:.0%}",
            *sent,
        )
    Console(width=150).print(shown)
    return rows


def quarter_rate(results: dict[str, list[dict[str, Any]]]) -> float:
    """A quarter of what writing everything within a forward pass, a third of a step, takes; MiB/s."""
    steps, _ = split(results["ssd"])
    needed = steps[-1]["eligible"] / (statistics.median(s["seconds"] for s in steps) / 3)
    return needed / 4 / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", default=".", help="on the drive")
    parser.add_argument("--shape", default="", help=f"{' or '.join(SHAPES)}; both by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--only", default="", help="contestants, by commas")
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    names = list(CONTESTANTS | (ON_GPU if args.device == "cuda" else {}))
    obstacle = torchtune_obstacle()
    if obstacle:
        Console().print(f"{TORCHTUNE} does not run here: {obstacle}", markup=False)
    else:
        names.append(TORCHTUNE)
    if args.only:
        names = ["nothing", *(name for name in args.only.split(",") if name != "nothing")]
    records = [
        run_shape(parser, names, shape)
        for shape in (args.shape.split(",") if args.shape else SHAPES)
    ]
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=2) + "\n")


def run_shape(parser: argparse.ArgumentParser, names: list[str], shape: str) -> dict[str, Any]:
    """All contestants with one shape: its table, and what is recorded of it."""
    changed = [f"--{key.replace('_', '-')}={value}" for key, value in SHAPES[shape].items()]
    arguments = [*changed, *sys.argv[1:]]  # what the caller names wins
    args = parser.parse_args(arguments)
    throttled = "ssd at a quarter of the rate"
    if throttled in names:
        short = argparse.Namespace(**{**vars(args), "warm_up": 2, "repetitions": 2})
        limit = quarter_rate(compare(short, ["ssd"], arguments))
        arguments = [*arguments, "--limit", str(limit)]
    results = compare(args, names, arguments)
    title = (
        f"{args.layers} layers, hidden {args.hidden}, {args.micro_batches} x {args.micro_batch} x "
        f"{args.seq_len} tokens, {args.precision} on {args.device}"
    )
    return {"title": title, "machine": machine(), "rows": table(results, title)}


if __name__ == "__main__":
    main()
