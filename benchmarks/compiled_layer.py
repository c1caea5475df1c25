"""What train.compile saves of a transformer layer's time: python benchmarks/compiled_layer.py

One layer and its regions pass forwards and backwards, as they are and compiled, in turn. Times are
processor time, which other work on the machine changes least; with several threads, of which some
spin, the table has the time that passes. Compilation itself is measured with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harness import machine
from holdfast.parallel.pipeline import MicroBatchContext
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.models import (
    RegionSizes,
    build_chunk,
    compile_regions,
    family_of,
    layer_specs,
)
from holdfast.trainer.models.compilation import compiled
from holdfast.trainer.models.llama.family import LlamaConfig

MICRO_BATCH = 2
Pass = Callable[[], Any]


def passes(hidden: int, seq_len: int, precision: str) -> dict[str, tuple[Pass, Pass]]:
    """Of a layer and each of its regions: the pass as it is, and the compiled one."""
    model = LlamaConfig(family="llama", layers=1, hidden=hidden, vocab=256, max_seq_len=seq_len)
    dtype, device = PRECISIONS[precision].dtype, torch.device("cpu")
    family = family_of("llama")
    assert family.compiled_regions is not None
    sizes = RegionSizes(1, seq_len, seq_len, seq_len, MICRO_BATCH, dtype, device)
    regions = list(family.compiled_regions(model, sizes))
    compile_regions(regions, 1)
    found: dict[str, tuple[Pass, Pass]] = {
        region.function.__name__: (
            _region(region.function, region.arguments),
            _region(compiled(region.function), region.arguments),
        )
        for region in regions
    }
    found["layer"] = (
        _layer(model, seq_len, precision, compiles=False),
        _layer(model, seq_len, precision, compiles=True),
    )
    return found


def _region(function: Callable[..., Tensor], arguments: Sequence[Any]) -> Pass:
    learned = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    gradient = torch.ones_like(function(*arguments))
    return lambda: torch.autograd.grad(function(*arguments), learned, gradient)


def _layer(model: LlamaConfig, seq_len: int, precision: str, *, compiles: bool) -> Pass:
    specs = layer_specs(
        model,
        tensor=1,
        sequence_parallel=False,
        seq_len=seq_len,
        micro_batch=MICRO_BATCH,
        precision=precision,
        recompute="none",
    )
    dtype = PRECISIONS[precision].dtype
    layer = build_chunk(
        model,
        range(1, 2),
        specs,
        dtype=dtype,
        device=torch.device("cpu"),
        seq_len=seq_len,
        seed=1,
        compiles=compiles,
    )
    learned = list(layer.parameters())
    value = torch.randn(seq_len, MICRO_BATCH, model.hidden).to(dtype).requires_grad_()
    gradient = torch.ones_like(value)
    context = MicroBatchContext(0, 0, True, None)
    return lambda: torch.autograd.grad(layer(value, context), [value, *learned], gradient)


def measure(both: tuple[Pass, Pass], repetitions: int) -> list[list[tuple[float, float]]]:
    """Milliseconds of processor time, and those that pass, of each; the first do not count."""
    found: list[list[tuple[float, float]]] = [[], []]
    for number in range(2 + repetitions):
        for times, work in zip(found, both, strict=True):
            start, clock = time.process_time(), time.perf_counter()
            work()
            spent = time.process_time() - start, time.perf_counter() - clock
            if number >= 2:
                times.append((spent[0] * 1e3, spent[1] * 1e3))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_deterministic_debug_mode("error")  # as exact mode does
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore
    clock = "of processor time" if given.threads == 1 else "that pass"
    table = Table(title=f"ms {clock}, threads: {given.threads}; as it is > compiled")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for precision in given.precision:
            for hidden in given.hidden:
                for seq_len in given.seq_len:
                    sizes = {"precision": precision, "hidden": hidden, "seq_len": seq_len}
                    rows.append(sizes | _row(hidden, seq_len, precision, given.repetitions))
                    if not table.columns:
                        for column in rows[0]:
                            table.add_column(column)
                    table.add_row(*(_shown(v, given.threads) for v in rows[-1].values()))
    Console(width=150).print(table)
    if given.json:
        record = {"title": "A compiled layer", "machine": machine(), "rows": rows}
        Path(given.json).write_text(json.dumps(record, indent=2) + "\n")


def _row(hidden: int, seq_len: int, precision: str, repetitions: int) -> dict[str, Any]:
    start = os.times()
    work = passes(hidden, seq_len, precision)
    spent = [b - a for a, b in zip(start[:4], os.times()[:4], strict=True)]
    times = {name: measure(both, repetitions) for name, both in work.items()}
    return {"compile_s": sum(spent), **times}


def _shown(value: Any, threads: int) -> str:
    if not isinstance(value, list):
        return f"{value:.0f}" if isinstance(value, float) else str(value)
    before, after = ([pair[threads > 1] for pair in times] for times in value)
    return " > ".join(
        f"{median(times):.2f} ({min(times):.2f}..{max(times):.2f})" for times in (before, after)
    )


if __name__ == "__main__":
    main()
