"""Offloaded activations beside nothing, save_on_cpu, recomputation and a slow drive: memory and
step time.

One process per contestant, which take turns step by step; a Llama of 24 layers. Memory is what a
step takes at most above what was taken before the first: in use (of the allocator, sampled every
millisecond of a step that is not timed) and, on a CPU, the resident set; on a GPU what torch's
allocator gave out. Before anything is timed, all contestants' gradients are compared bit by bit.

Contestants that offload have the heap that `holdfast train` gives them (docs/offload.md), the
others that of every process.

Both shapes take about five minutes on a quiet machine. A second table says what a step costs the
processor, by main thread, other threads (of the file engine) and system, with page faults and
context switches.

    python benchmarks/offload.py --folder /nvme [--device cuda] [--hidden 512] [--json out.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
sys.path.insert(0, os.path.dirname(__file__))

import torch
from rich.console import Console

from harness import machine
from holdfast.parallel.offload import compact_heap_environment
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step.build import open_training
from holdfast.trainer.step.training import Training
from holdfast.trainer.worlds.world import local_world
from offload_memory import Memory
from offload_tables import MIB, table
from support.runs.small_runs import make_config

SSD = {"offload": {"activations": "ssd"}}
CONTESTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {},
    "ssd": SSD,
    "ssd at a quarter of the rate": SSD,
    "full recompute": {"train": {"recompute": "full"}},
    "host": {"offload": {"activations": "host"}},
    "save_on_cpu": {},
}
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "nothing in the compact heap": {},
    "ssd and selective recompute": SSD | {"train": {"recompute": "selective"}},
    "selective recompute": {"train": {"recompute": "selective"}},
}
"""Run with --all, or by their names with --only."""
THROTTLED = "ssd at a quarter of the rate"
TORCHTUNE = "torchtune OffloadActivations"
"""Run where torchtune is installed and its context can be made; else it is said why not."""
SHAPES: dict[str, dict[str, int]] = {
    "small": {},
    "deep": {"hidden": 512},
    "large": {"layers": 8, "hidden": 512, "seq_len": 512, "warm_up": 1, "repetitions": 3},
}
"""Of models; "deep" and "large" have twice the operations for a byte."""
COMPACT = {
    name
    for name, sections in (CONTESTANTS | OTHERS).items()
    if sections.get("offload") == SSD["offload"]
} | {"nothing in the compact heap"}
_ADAPTING = 4
"""Steps of a throttled contestant, beside its first, before it takes part."""


def torchtune_obstacle() -> str:
    """Why torchtune's activation offload does not run here; empty where it does."""
    try:
        from torchtune.training import OffloadActivations  # pyrefly: ignore[missing-import]

        OffloadActivations()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def configuration(args: argparse.Namespace, name: str) -> RunConfig:
    sections = (CONTESTANTS | OTHERS).get(name, {})
    offload = dict(sections.get("offload", {}))
    if offload.get("activations") == "ssd":
        offload["path"] = args.folder
    if name == THROTTLED:
        offload["limit_mib_per_s"] = args.limit
    # "host" is refused where a CPU is asked for, since it saves nothing there: here that is shown.
    device = "auto" if name == "host" and args.device == "cpu" else args.device
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
            "device": device,
            "precision": args.precision,
            "threads_per_rank": args.threads,
            **sections.get("train", {}),
        },
        optimizer={"block_elements": 1048576},
        offload=offload,
    )


def processor_use() -> dict[str, float]:
    """Of this process since it began; seconds and counts."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    main = resource.getrusage(resource.RUSAGE_THREAD)
    return {
        "processor": own.ru_utime + own.ru_stime,
        "main": main.ru_utime + main.ru_stime,
        "system": own.ru_stime,
        "faults": own.ru_minflt,
        "switches": own.ru_nvcsw + own.ru_nivcsw,
    }


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
            before, start = processor_use(), time.perf_counter()
            step()
            figures["seconds"] = time.perf_counter() - start
            after = processor_use()
            figures |= {key: after[key] - before[key] for key in after}
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
        heap = compact_heap_environment(os.environ) if name in COMPACT else {}
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
    first = [name for name in names if name != THROTTLED]
    contestants = {name: Contestant(name, arguments) for name in first}
    for contestant in contestants.values():
        contestant.step()
    if THROTTLED in names:
        limit = quarter_rate(contestants["ssd"], contestants["nothing"])
        throttled = Contestant(THROTTLED, [*arguments, "--limit", str(limit)])
        for _ in range(1 + _ADAPTING):
            throttled.step()
        contestants[THROTTLED] = throttled
    digests = {name: contestant.steps[0]["digest"] for name, contestant in contestants.items()}
    assert len(set(digests.values())) == 1, digests
    for number in range(args.warm_up - 1 + args.repetitions):
        for contestant in contestants.values():
            if number == args.warm_up - 1:
                contestant.steps.clear()
            contestant.step()
    for contestant in contestants.values():
        for _ in range(args.memory_steps):
            contestant.step("memory")
        contestant.close()
    return {name: contestants[name].steps for name in names}


def quarter_rate(sending: Contestant, nothing: Contestant) -> float:
    """A quarter of what writing everything within a forward pass, a third of a step, takes;
    MiB/s.
    """
    needed = sending.steps[-1]["eligible"] / (nothing.step()["seconds"] / 3)
    return needed / 4 / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", default=".", help="on the drive")
    parser.add_argument("--shape", default="", help=f"{' or '.join(SHAPES)}; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1, help="each with new processes")
    parser.add_argument("--memory-steps", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="the less telling contestants too")
    parser.add_argument("--only", default="", help="contestants, by commas")
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    names = list(CONTESTANTS | (OTHERS if args.all else {}))
    if args.device == "cpu" and torch.cuda.is_available():
        names.remove("host")
    obstacle = torchtune_obstacle()
    if obstacle:
        Console().print(f"{TORCHTUNE} does not run here: {obstacle}", markup=False)
    else:
        names.append(TORCHTUNE)
    if args.only:
        wanted = args.only.split(",")
        needed = ["nothing", "ssd"] if THROTTLED in wanted else ["nothing"]
        names = [*needed, *(name for name in wanted if name not in needed)]
    records = [
        run_shape(parser, names, shape)
        for shape in (args.shape.split(",") if args.shape else SHAPES)
        for _ in range(args.rounds)
    ]
    if args.rounds > 1:
        console = Console()
        for title, ratios in ratios_by_title(records).items():
            text = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            console.print(f"{title}, of nothing: {statistics.median(ratios):.3f} ({text})")
    if args.json:
        Path(args.json).write_text(json.dumps(records, indent=2) + "\n")


def ratios_by_title(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """A process is a few per cent faster or slower than the next with the same work: every
    round's ratio.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        for row in record["rows"]:
            found.setdefault(f"{record['title']}: {row['contestant']}", []).append(row["ratio"])
    return found


def run_shape(parser: argparse.ArgumentParser, names: list[str], shape: str) -> dict[str, Any]:
    """All contestants with one shape: its table, and what is recorded of it."""
    changed = [f"--{key.replace('_', '-')}={value}" for key, value in SHAPES[shape].items()]
    arguments = [*changed, *sys.argv[1:]]  # what the caller names wins
    args = parser.parse_args(arguments)
    results = compare(args, names, arguments)
    title = (
        f"{args.layers} layers, hidden {args.hidden}, {args.micro_batches} x {args.micro_batch} x "
        f"{args.seq_len} tokens, {args.precision} on {args.device}"
    )
    return {"title": title, "machine": machine(), "rows": table(results, title)}


if __name__ == "__main__":
    main()
