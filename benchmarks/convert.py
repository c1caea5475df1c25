"""Converting, against DeepSpeed's and torch's own converters and against copying the same bytes.

Every contestant is a command of its own, from its start to its end, with cold files (dropped from the page
cache before each). Ours verifies what it has written, which the others do not. Processor time is told too: on
a machine with other work it says more than the clock.

    python benchmarks/convert.py [--layers 8] [--workers 2] [--repetitions 3] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
sys.path.insert(0, str(HERE))

from cluster import Cluster  # noqa: E402
from harness import Measurement, alternate, machine, report  # noqa: E402

RANKS = 2
PYTHON = sys.executable
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
OURS = [PYTHON, "-m", "holdfast.launch.cli", "convert"]


def folder_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def drop(path: Path) -> None:
    """Put a folder's files out of the page cache, so that everybody reads them from the disk."""
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

    def copy(self, source: Path) -> Callable[[], float]:
        """dd past the page cache, file by file; what is smaller than a block by cp."""
        script = (
            "mkdir -p OUT; cd %s; find . -type f | while read f; do mkdir -p OUT/$(dirname $f); "
            "dd if=$f of=OUT/$f bs=8M iflag=direct oflag=direct conv=fsync status=none || cp $f OUT/$f; "
            "done"
        )
        return lambda: self.timed("copy, O_DIRECT", source, ["bash", "-c", script % source])


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
    torch_file = "import sys; from torch.distributed.checkpoint.format_utils import *; dcp_to_torch_save(*sys.argv[1:])"
    subprocess.run(
        [PYTHON, "-c", torch_file, str(folder / "dcp"), str(folder / "torch.pt")], check=True
    )


def peak_of_ours(source: Path, out: Path) -> tuple[int, int]:
    """(bytes that a conversion in one process takes beside its imports, its largest tensor)."""
    code = (
        "import resource, shutil, sys\n"
        "from pathlib import Path\n"
        "from holdfast.checkpoint.convert.formats import dcp, deepspeed_universal\n"
        "from holdfast.checkpoint.convert.job import convert\n"
        "from holdfast.checkpoint.convert.request import Conversion\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "convert(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), 'deepspeed-universal',\n"
        "                   memory_bytes=128 << 20))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
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
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        make_sources(folder, options.layers)
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
                "copy, O_DIRECT": bench.copy(source),
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
            contests[title]["copy, O_DIRECT"] = bench.copy(folder / source)
        results: list[dict[str, object]] = []
        for title, contestants in contests.items():
            bench.cpu_s.clear()
            for unit, rows in (
                ("", alternate(contestants, options.repetitions)),
                (": processor time", [Measurement(n, tuple(t)) for n, t in bench.cpu_s.items()]),
            ):
                report(title + unit, rows, {row.name: rows[0].median_s for row in rows})
                results += [
                    {"title": title + unit, "name": r.name, "times_s": r.times_s} for r in rows
                ]
        sizes = {
            p.name: round(folder_bytes(p) / 2**30, 3)
            for p in (folder / "zero2", folder / "zero3", folder / "dcp")
        }
        peak, largest = peak_of_ours(folder / "zero2/global_step1", folder / "out")
        note = (
            f"GiB of the sources: {sizes}; a conversion in one process with --memory-limit 128M takes "
            f"{peak / 2**20:.0f} MiB beside its imports, its largest tensor has {largest / 2**20:.0f} MiB"
        )
        Console(width=110).print(note)
        if options.json:
            record = {"machine": machine(), "note": note, "results": results}
            Path(options.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
