"""Converting, against DeepSpeed's and torch's own converters and against copying the same bytes.

Every contestant is a command of its own, from its start to its end, with cold files (dropped from
the page cache before each), durable at the end. Ours reads back everything that it has written,
which the others do not. There are two copies of the source's bytes, both with O_DIRECT: dd, one
block at a time, and the file engine that conversions use, eight blocks at a time. Processor time is
told too: on a machine with other work it says more than the clock. The last two contests are larger
(--large-gib), so that what a command takes to start counts less.

    python benchmarks/convert.py [--layers 8] [--workers 2] [--repetitions 2] \\
        [--large-gib 3] [--only WORDS]
        [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

TO_HUGGING_FACE = """
import sys, torch
import torch.distributed.checkpoint as dcp
source, target = sys.argv[1:]
found = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
state = {"model": {key.removeprefix("model."): torch.empty(e.size, dtype=e.properties.dtype)
                   for key, e in found.items()}}
dcp.load(state, checkpoint_id=source)
writer = dcp.HuggingFaceStorageWriter(
    target, fqn_to_index_mapping=dict.fromkeys(state["model"], 1), save_distributed=True,
    enable_consolidation=True, thread_count_consolidation=5)
dcp.save(state["model"], storage_writer=writer)
"""
FROM_HUGGING_FACE = """
import sys, torch
import torch.distributed.checkpoint as dcp
source, target = sys.argv[1:]
reader = dcp.HuggingFaceStorageReader(source)
found = reader.read_metadata().state_dict_metadata
state = {key: torch.empty(e.size, dtype=e.properties.dtype) for key, e in found.items()}
dcp.load(state, storage_reader=reader)
dcp.save({"model": state}, checkpoint_id=target)
"""
"""What torchtitan's scripts (checkpoint_conversion) do, without the names that they change."""

ENGINE_COPY = """
import sys
from pathlib import Path
import numpy as np
from holdfast import _native
source, target = map(Path, sys.argv[1:])
BLOCK, SLOTS = 8 << 20, 8
memory = np.empty(SLOTS * BLOCK + 4096, np.uint8)
start = memory.ctypes.data + -memory.ctypes.data % 4096
with _native.FileEngine() as engine:
    for path in (p for p in source.rglob("*") if p.is_file()):
        out = target / path.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        old, new = engine.open(str(path)), engine.open(str(out), write=True, create=True, size=size)
        reads, writes = {}, {}
        count = -(-size // BLOCK)
        for number in range(count + SLOTS // 2):
            if number < count:
                if number >= SLOTS:
                    engine.wait(writes.pop(number - SLOTS))
                at, length = number * BLOCK, min(BLOCK, size - number * BLOCK)
                reads[number] = engine.read(old, start + number % SLOTS * BLOCK, at, length)
            ready = number - SLOTS // 2
            if ready >= 0:
                engine.wait(reads.pop(ready))
                at, length = ready * BLOCK, min(BLOCK, size - ready * BLOCK)
                writes[ready] = engine.write(new, start + ready % SLOTS * BLOCK, at, length)
        engine.sync(new)
        engine.close_file(old)
        engine.close_file(new)
"""

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
sys.path.insert(0, str(HERE))

from harness import Measurement, alternate, machine, report  # noqa: E402
from support.processes.cluster import Cluster  # noqa: E402

RANKS = 2
PYTHON = sys.executable
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
DD, ENGINE = "copy by dd, O_DIRECT", "copy by the file engine"
OURS = [PYTHON, "-m", "holdfast.launch.cli", "convert"]


def folder_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def drop(path: Path) -> None:
    """Drop a folder's files from the page cache, so that every contestant reads the disk."""
    os.sync()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


class Bench:
    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self.cpu_s: dict[str, list[float]] = {}

    def timed(self, name: str, source: Path, command: Sequence[str]) -> float:
        """One run of a command whose output goes to a fresh `out`; durable at its end."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        drop(source)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        subprocess.run(
            [word.replace("OUT", str(out)) for word in command],
            env=ENVIRONMENT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.sync()
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.cpu_s.setdefault(name, []).append(used)
        return seconds

    def ours(self, source: Path, to: str, *more: str) -> Callable[[], float]:
        command = [*OURS, str(source), "OUT", "--to", to, "--workers", str(self.workers), *more]
        return lambda: self.timed("holdfast", source, command)

    def copies(self, source: Path) -> dict[str, Callable[[], float]]:
        """The source's bytes past the page cache: by dd, file by file, and by the file engine."""
        script = (
            "cd %s; find . -type f | while read f; do mkdir -p OUT/$(dirname $f); "
            "dd if=$f of=OUT/$f bs=8M iflag=direct oflag=direct conv=fsync status=none; done"
        )
        commands = {
            DD: ["bash", "-c", script % source],
            ENGINE: [PYTHON, "-c", ENGINE_COPY, str(source), "OUT"],
        }
        return {n: partial(self.timed, n, source, command) for n, command in commands.items()}


def make_sources(folder: Path, layers: int) -> None:
    for name, function, keys in (
        ("zero2", "save_deepspeed", {"stage": 2}),
        ("zero3", "save_deepspeed", {"stage": 3}),
        ("dcp", "save_dcp", {}),
    ):
        pool = Cluster(RANKS)
        try:
            pool.run(
                f"convert_ranks:{function}",
                RANKS,
                timeout_s=600,
                layers=layers,
                folder=str(folder / name),
                **keys,
            )
        finally:
            pool.close()
    subprocess.run([*OURS, str(folder / "dcp"), str(folder / "hf"), "--to", "hf"], check=True)
    torch_file = (
        "import sys; from torch.distributed.checkpoint.format_utils import *; "
        "dcp_to_torch_save(*sys.argv[1:])"
    )
    subprocess.run(
        [PYTHON, "-c", torch_file, str(folder / "dcp"), str(folder / "torch.pt")], check=True
    )


def make_large(folder: Path, gib: float) -> None:
    """A Hugging Face folder, and the same as torch.distributed.checkpoint keeps it."""
    block = np.random.default_rng(1).standard_normal((4096, 2048), np.float32)
    (folder / "large-hf").mkdir()
    count = max(1, int(gib * 2**30) // block.nbytes)
    save_file(
        {f"layers.{number}.weight": block for number in range(count)},
        folder / "large-hf/model.safetensors",
    )
    arguments = [str(folder / "large-hf"), str(folder / "large-dcp"), "--to", "dcp"]
    subprocess.run([*OURS, *arguments], check=True, stdout=subprocess.DEVNULL)


def start_up_s(folder: Path) -> float:
    """Seconds that a conversion takes to find out that its source is not there."""
    began = time.perf_counter()
    command = [*OURS, str(folder / "nowhere"), str(folder / "out"), "--to", "hf"]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def peak_of_ours(source: Path, out: Path) -> tuple[int, int]:
    """(bytes that a conversion in one process takes beside its imports, its largest tensor)."""
    code = (
        "import shutil, sys\n"
        "from pathlib import Path\n"
        "from holdfast.checkpoint.convert.formats import dcp, deepspeed_universal\n"
        "from holdfast.checkpoint.convert.work.job import convert\n"
        "from holdfast.checkpoint.convert.work.request import Conversion\n"
        # Unlike ru_maxrss this does not begin with what the parent had.
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(x for x in lines if x.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "convert(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), 'deepspeed-universal',\n"
        "                   memory_bytes=128 << 20))\n"
        "print(peak() - before)\n"
    )
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [PYTHON, "-c", code, str(source), str(out)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1]) << 10, 32000 * 1024 * 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--large-gib", type=float, default=3.0)
    parser.add_argument("--only", default="", help="contests whose titles have these words")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        bench = Bench(folder, options.workers)
        many = str(options.workers)
        universal = [PYTHON, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        universal += ["--num_extract_workers", many, "--num_merge_workers", many]
        contests: dict[str, dict[str, Callable[[], float]]] = {}
        for stage in ("zero2", "zero3"):
            source = folder / stage / "global_step1"
            theirs = [*universal, "--input_folder", str(source), "--output_folder", "OUT"]
            contests[f"DeepSpeed {stage} to universal"] = {
                "ds_to_universal": lambda s=source, t=theirs: bench.timed("ds_to_universal", s, t),
                "holdfast": bench.ours(source, "deepspeed-universal"),
                **bench.copies(source),
            }
        for title, source, torch_source, function, code, to in (
            ("DCP to Hugging Face", "dcp", "dcp", "dcp_to_torch_save", TO_HUGGING_FACE, "hf"),
            (
                "Hugging Face to DCP",
                "hf",
                "torch.pt",
                "torch_save_to_dcp",
                FROM_HUGGING_FACE,
                "dcp",
            ),
        ):
            utility = "import sys; from torch.distributed.checkpoint.format_utils import *; "
            contests[title] = {}
            for name, place, text in (
                (
                    "torch format_utils (one .pt)",
                    torch_source,
                    f"{utility}{function}(*sys.argv[1:])",
                ),
                ("torchtitan's way", source, code),
            ):
                command = [PYTHON, "-c", text, str(folder / place), "OUT"]
                contests[title][name] = partial(bench.timed, name, folder / place, command)
            contests[title]["holdfast"] = bench.ours(folder / source, to)
            contests[title] |= bench.copies(folder / source)
        for source, to in (("large-hf", "dcp"), ("large-dcp", "hf")):
            title = f"{source} to {to}, {options.large_gib:g} GiB"
            contests[title] = {"holdfast": bench.ours(folder / source, to)}
            contests[title] |= bench.copies(folder / source)
        contests = {title: c for title, c in contests.items() if options.only in title}
        if any(title.startswith("large") for title in contests):
            make_large(folder, options.large_gib)
        if any(not title.startswith("large") for title in contests):
            make_sources(folder, options.layers)
        start_up = statistics.median(start_up_s(folder) for _ in range(3))
        results: list[dict[str, object]] = []
        console = Console(width=110)
        for title, contestants in contests.items():
            bench.cpu_s.clear()
            wall = alternate(contestants, options.repetitions)
            cpu = [Measurement(name, tuple(times)) for name, times in bench.cpu_s.items()]
            for unit, rows in (("", wall), (": processor time", cpu)):
                report(title + unit, rows, {row.name: rows[0].median_s for row in rows})
                results += [
                    {"title": title + unit, "name": r.name, "times_s": r.times_s} for r in rows
                ]
            median = {row.name: row.median_s for row in wall}
            over = {name: round(median["holdfast"] / median[name], 2) for name in (DD, ENGINE)}
            less = {name: round((median["holdfast"] - start_up) / median[name], 2) for name in over}
            results.append({"title": title, "over_copy": over, "over_copy_without_start_up": less})
            console.print(f"over a copy: {over}; without {start_up:.2f} s of start-up: {less}")
        note = f"start-up of a conversion: {start_up:.2f} s"
        if (folder / "zero2").is_dir():
            sizes = {
                p.name: round(folder_bytes(p) / 2**30, 3)
                for p in (folder / "zero2", folder / "zero3", folder / "dcp")
            }
            peak, largest = peak_of_ours(folder / "zero2/global_step1", folder / "out")
            note += (
                f"; GiB of the sources: {sizes}; a conversion in one process with "
                f"--memory-limit 128M takes "
                f"{peak / 2**20:.0f} MiB beside its imports, "
                f"its largest tensor has {largest / 2**20:.0f} MiB"
            )
        console.print(note)
        if options.json:
            record = {"machine": machine(), "note": note, "results": results}
            Path(options.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
