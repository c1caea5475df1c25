"""Saving beside training, against what torch programs use for it; loading, cold and warm; raw
throughput.

Four ranks with a state of DTensors and AdamW's moments. Compute is emulated by sleeping (the cores
are fewer than the ranks); updates, copies and writes are real. Three figures for each contestant:
seconds that the training thread was blocked, of the loop, and of all including the last drain.

    python benchmarks/checkpoint.py [--gib 1.5] [--repetitions 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
sys.path.insert(0, str(HERE))

from harness import machine  # noqa: E402
from support.processes.cluster import Cluster  # noqa: E402

RANKS, ROWS, COLUMNS = 4, 4096, 1024
PEERS = {"torchsnapshot": "torchsnapshot", "torch_checkpointing": "torch_checkpointing"}


class Bench:
    def __init__(self, gib: float, folder: Path) -> None:
        self.tensors = max(1, round(gib * 2**30 / (12 * ROWS * COLUMNS)))
        self.bytes = 12 * ROWS * COLUMNS * self.tensors
        self.folder = folder
        self.cluster = Cluster()

    def _sizes(self) -> dict[str, int]:
        return {"tensors": self.tensors, "rows": ROWS}

    def loop(self, name: str, *, steps: int, every: int, compute_s: float) -> dict[str, float]:
        place = self.folder / "loop"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        found = self.cluster.run(
            "checkpoint_ranks:loop",
            RANKS,
            timeout_s=600,
            name=name,
            folder=str(place),
            steps=steps,
            every=every,
            compute_s=compute_s,
            **self._sizes(),
        )
        shutil.rmtree(place, ignore_errors=True)
        # Every process of the pool keeps the memory of what ran before: a fresh pool tells the
        # peak.
        self.cluster.close()
        return {key: max(result[key] for result in found) for key in found[0]}

    def load(self, name: str, ranks: int, dim: int, cold: bool) -> dict[str, float]:
        found = self.cluster.run(
            "checkpoint_ranks:load",
            ranks,
            timeout_s=600,
            name=name,
            folder=str(self.folder / "made" / name),
            dim=dim,
            cold=cold,
            **self._sizes(),
        )
        return {
            "seconds": max(result["seconds"] for result in found),
            "read": sum(result["read"] for result in found) / self.bytes,
        }

    def make(self) -> None:
        place = str(self.folder / "made")
        self.cluster.run(
            "checkpoint_ranks:make", RANKS, timeout_s=600, folder=place, **self._sizes()
        )

    def write(self) -> float:
        place = self.folder / "write"
        found = self.cluster.run(
            "checkpoint_ranks:write_once", RANKS, timeout_s=600, folder=str(place), **self._sizes()
        )
        shutil.rmtree(place)
        return max(found)

    def fio(self, operation: str) -> float | None:
        """Seconds that fio takes for the same bytes with as many jobs, past the page cache."""
        if shutil.which("fio") is None:
            return None
        place = self.folder / "fio"
        if operation == "write":
            # New files each time, as a checkpoint's are: writing over old ones is a third faster
            # here.
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(exist_ok=True)
        command = [
            "fio", "--name=job", f"--directory={place}", f"--rw={operation}",
            "--bs=1M", "--direct=1",
            "--ioengine=libaio", "--iodepth=16", f"--numjobs={RANKS}",
            f"--size={self.bytes // RANKS}",
            "--end_fsync=1", "--group_reporting", "--output-format=json",
        ]  # fmt: skip
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall = time.perf_counter() - began
        job = json.loads(done.stdout)["jobs"][0]
        measured = job["read" if operation == "read" else "write"]["runtime"] / 1000
        return measured or wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.5)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--compute-s", type=float, default=1.0)
    parser.add_argument("--folder", default=None, help="where checkpoints are written")
    parser.add_argument("--json", default=None)
    parser.add_argument("--parts", default="write,loop,sweep,load")
    parser.add_argument("--without", default="", help="contestants to leave out, by commas")
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "arguments": vars(given)}
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        bench = Bench(given.gib, Path(scratch))
        results["bytes"] = bench.bytes
        parts = given.parts.split(",")
        if "write" in parts:
            results["write"] = _write(bench, given.repetitions)
        if "loop" in parts:
            results["loop"] = _loops(bench, given)
        if "sweep" in parts:
            results["sweep"] = _sweep(bench, given)
        if "load" in parts:
            results["load"] = _loads(bench, given.repetitions)
        bench.cluster.close()
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=2) + "\n")


def _write(bench: Bench, repetitions: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"holdfast": [], "fio": []}
    for _ in range(repetitions):
        times["holdfast"].append(bench.write())
        fio = bench.fio("write")
        if fio is not None:
            times["fio"].append(fio)
    table = Table(
        title=f"Writing {bench.bytes / 2**30:.2f} GiB from {RANKS} ranks until it is durable"
    )
    for column in ("contestant", "GB/s (median)", "min..max s"):
        table.add_column(column)
    for name, values in times.items():
        if values:
            rate = bench.bytes / statistics.median(values) / 1e9
            table.add_row(name, f"{rate:.2f}", f"{min(values):.2f}..{max(values):.2f}")
    if times["fio"]:
        ratio = statistics.median(times["fio"]) / statistics.median(times["holdfast"])
        table.caption = (
            f"holdfast / fio: {ratio:.2f} (holdfast's time has plan, votes, syncs and commit)"
        )
    else:
        table.caption = "fio is not installed (Debian: apt-get install fio)"
    Console(width=110).print(table)
    return times


def _contestants() -> list[str]:
    found = ["none", "holdfast", "holdfast, arena 1/4", "dcp.save", "dcp.async_save"]
    return found + [name for name, module in PEERS.items() if importlib.util.find_spec(module)]


def _loops(bench: Bench, given: argparse.Namespace) -> dict[str, Any]:
    left_out = given.without.split(",")
    rows: dict[str, list[dict[str, float]]] = {
        name: [] for name in _contestants() if name not in left_out
    }
    failed: dict[str, str] = {}
    for _ in range(given.repetitions):
        for name in list(rows):
            try:
                rows[name].append(
                    bench.loop(name, steps=given.steps, every=1, compute_s=given.compute_s)
                )
            except AssertionError as error:
                failed[name] = str(error).strip().splitlines()[-1]
                del rows[name]
    _show(
        f"A checkpoint of {bench.bytes / 2**30:.2f} GiB at every one of {given.steps} steps", rows
    )
    for name, reason in failed.items():
        Console().print(f"{name} does not run here: {reason}")
    return {"rows": rows, "failed": failed}


def _sweep(bench: Bench, given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for every in (1, 2, 5, 10):
        rows: dict[str, list[dict[str, float]]] = {}
        for name in ("none", "holdfast", "holdfast, arena 1/4", "dcp.async_save"):
            rows[name] = [bench.loop(name, steps=10, every=every, compute_s=given.compute_s)]
        _show(f"10 steps, a checkpoint every {every}", rows)
        found[str(every)] = rows
    return found


def _show(title: str, rows: dict[str, list[dict[str, float]]]) -> None:
    table = Table(title=title)
    for column in (
        "contestant",
        "blocked s",
        "loop s",
        "end to end s",
        "of none",
        "peak GiB a rank",
    ):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    base = statistics.median(run["end"] for run in rows["none"])
    for name, runs in rows.items():
        if not runs:
            continue
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        spread = f" ({min(r['end'] for r in runs):.1f}..{max(r['end'] for r in runs):.1f})"
        table.add_row(
            name,
            f"{middle['blocked']:.4f}",
            f"{middle['loop']:.2f}",
            f"{middle['end']:.2f}{spread}",
            f"{middle['end'] / base:.3f}",
            f"{middle['peak'] / 2**30:.2f}",
        )
    Console(width=110).print(table)


def _loads(bench: Bench, repetitions: int) -> dict[str, Any]:
    bench.make()
    fio = [bench.fio("read") for _ in range(repetitions)]
    cases = {
        "same layout": (4, 0),
        "2 ranks": (2, 0),
        "other dimension": (4, 1),
    }
    table = Table(title=f"Loading {bench.bytes / 2**30:.2f} GiB")
    for column in ("case", "holdfast s", "dcp.load s", "holdfast / dcp", "read / needed"):
        table.add_column(column, justify="left" if column == "case" else "right")
    found: dict[str, Any] = {}
    for case, (ranks, dim) in cases.items():
        for cold in (True, False):
            runs: dict[str, list[dict[str, float]]] = {"holdfast": [], "dcp": []}
            for _ in range(repetitions):
                for name in runs:
                    runs[name].append(bench.load(name, ranks, dim, cold))
            ours, theirs = (
                statistics.median(run["seconds"] for run in runs[name]) for name in runs
            )
            reads = [runs[name][0]["read"] for name in runs]
            label = f"{case}, {'cold' if cold else 'warm'}"
            table.add_row(
                label,
                f"{ours:.2f}",
                f"{theirs:.2f}",
                f"{ours / theirs:.2f}",
                f"{reads[0]:.2f} / {reads[1]:.2f}",
            )
            found[label] = runs
    if fio[0] is not None:
        table.caption = (
            f"fio reads as many bytes past the page cache in {statistics.median(fio):.2f} s"
        )
    Console(width=110).print(table)
    return {**found, "fio read": fio}


if __name__ == "__main__":
    main()
