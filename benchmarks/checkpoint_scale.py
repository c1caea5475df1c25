"""Planning at scale, without tensors: the manifest of a trillion parameters over 3,072 ranks.

The write plan and the manifest are built, written and read, and the read plan of one rank of
another layout is made; one process, times in seconds.

    python benchmarks/checkpoint_scale.py [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from harness import TRILLION
from holdfast.checkpoint.format.files import decode_manifest, encode_manifest
from holdfast.checkpoint.format.manifest import SaveFacts, build_manifest
from holdfast.checkpoint.loading.read_plan import check_coverage, make_read_plan
from holdfast.checkpoint.saving.write_plan import make_write_plan
from holdfast.trainer.config import RunConfig
from holdfast.trainer.step.planning import plan_of
from holdfast.trainer.step.saved_tensors import saved_tensors, state_format, wanted_boxes

T = TypeVar("T")


def config(tensor: int, pipeline: int, data: int) -> RunConfig:
    return msgspec.convert(
        {
            "model": TRILLION,
            "train": {"precision": "bf16", "seq_len": 4096, "global_batch": 3072, "micro_batch": 1},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "data": data},
            "optimizer": {"block_elements": 1 << 24},
        },
        RunConfig,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    times: dict[str, float] = {}

    def timed(what: str, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = call()
        times[what] = time.perf_counter() - began
        return result

    before, after = config(8, 16, 24), config(8, 32, 8)
    plan, form = plan_of(before), state_format(before)
    tensors = timed("the holders of all boxes", lambda: saved_tensors(plan, form))
    nodes = [rank // 8 for rank in range(before.parallel.ranks)]
    write_plan = timed("write plan", lambda: make_write_plan(tensors, nodes))
    crcs = {
        rank: [0xDEADBEEF] * len(write_plan.written_by(rank))
        for rank in range(before.parallel.ranks)
    }
    headers = {file.name: 1 for file in write_plan.files}
    saved = SaveFacts(id="0" * 32, step=1, created=0.0, versions={}, scalars={}, config={})
    manifest, _ = timed(
        "manifest built", lambda: build_manifest(write_plan, crcs, headers, saved, {})
    )
    content = timed("manifest written", lambda: encode_manifest(manifest))
    again = timed("manifest read", lambda: decode_manifest(content, "manifest"))
    timed("coverage checked", lambda: check_coverage(again, "manifest"))
    target = plan_of(after)
    boxes = timed("boxes of one rank", lambda: wanted_boxes(target, 77, form))
    read = timed(
        "read plan of one rank",
        lambda: make_read_plan(again, {77: boxes}, load_bytes=32 << 20),
    )
    written = write_plan.written_bytes()
    mean = sum(written.values()) / len(written)
    parameters = sum(t.entry.bytes // 2 for t in tensors if t.whole)
    facts = {
        "parameters": parameters,
        "ranks": before.parallel.ranks,
        "chunks": sum(len(file.pieces) for file in write_plan.files),
        "files": len(write_plan.files),
        "checkpoint_bytes": manifest.bytes,
        "manifest_bytes": len(content),
        "largest_over_mean_bytes_by_rank": max(written.values()) / mean,
        "median_over_mean_bytes_by_rank": statistics.median(written.values()) / mean,
        "read_by_one_rank_bytes": read.bytes,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    table = Table(
        title=f"{parameters / 1e12:.2f} trillion parameters over {before.parallel.ranks} ranks"
    )
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, seconds in times.items():
        table.add_row(name, f"{seconds:.2f} s")
    for name, value in facts.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    Console(width=100).print(table)
    if given.json:
        Path(given.json).write_text(json.dumps({"times": times, **facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
