"""What the head and its loss cost in time and memory, by chunks of the vocabulary and as a whole:
python benchmarks/vocab_chunk.py

One micro-batch passes forwards and backwards through the projection to the vocabulary: whole
logits, chunks of several sizes, and torch's own path, which is that of transformers. Each
repetition is a process of its own, for its peak of resident memory. Times are processor time of one
thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from harness import machine
from holdfast.parallel.layout import Box, Initial, ParameterSpec
from holdfast.parallel.optimizer import GradientAccumulator, ParameterBuffer
from holdfast.parallel.pipeline import WeightGradientQueue
from holdfast.parallel.tensor_parallel import (
    TensorParallel,
    chunked_cross_entropy_sum,
    column_linear,
    cross_entropy_sum,
    of_parts,
)

TORCH = "torch, transformers"
WHOLE = "whole"
CHUNKS = (16384, 8192, 2048)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measure(
    contestant: str, vocab: int, tokens: int, hidden: int, precision: str
) -> dict[str, Any]:
    """Seconds of processor time of the second of two passes, and the peak above what is kept."""
    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    value = torch.randn(tokens, 1, hidden).to(dtype).requires_grad_()
    weight = nn.Parameter((torch.randn(vocab, hidden) * 0.02).to(dtype))
    targets = torch.randint(0, vocab, (tokens, 1))
    queue, tp = WeightGradientQueue(), TensorParallel(None, False)
    shape = (vocab, hidden)
    box, drawn = Box((0, 0), shape), Initial("constant", 0.0)
    spec = ParameterSpec("head", shape, box, "head", 0, drawn, True, (0,))
    buffer = ParameterBuffer([(0, spec, weight)], dtype=dtype, device=torch.device("cpu"))
    sums = GradientAccumulator(buffer, exact=True, fraction_bits=44, queues=[queue])

    def loss() -> torch.Tensor:
        if contestant == TORCH:
            logits = F.linear(value, weight).float().view(-1, vocab)
            return F.cross_entropy(logits, targets.view(-1), reduction="sum")
        if contestant == WHOLE:
            logits = column_linear(value, [of_parts([weight], queue)], tp)
            return cross_entropy_sum(logits, targets, [0], tp)
        return chunked_cross_entropy_sum(value, [weight], queue, targets, [0], tp, int(contestant))

    sums.sums.zero_()  # touched before anything is measured
    sums._scratch.zero_()
    for _ in range(2):
        value.grad = None
        Path("/proc/self/clear_refs").write_text("5")
        kept, start = _status("VmRSS"), time.process_time()
        result = loss()
        forward_s = time.process_time() - start
        result.backward()
        whole_s = time.process_time() - start
        peak = _status("VmHWM") - kept
    return {"forward_s": forward_s, "s": whole_s, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json")
    given = parser.parse_args()
    rows = []
    for precision in given.precision:
        for vocab in given.vocab:
            rows += _compared(given, vocab, precision)
    if given.json:
        record = {"title": "Loss by chunks of the vocabulary", "machine": machine(), "rows": rows}
        Path(given.json).write_text(json.dumps(record, indent=2) + "\n")


def _compared(given: argparse.Namespace, vocab: int, precision: str) -> list[dict[str, Any]]:
    names = [TORCH, WHOLE, *map(str, CHUNKS)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    # Forked, so that torch is imported once: this process has computed nothing, and has no threads.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name in names * given.repetitions:
            arguments = (name, vocab, given.tokens, given.hidden, precision)
            found[name].append(pool.apply(measure, arguments))
    title = f"{precision}, vocabulary {vocab}, {given.tokens} tokens, hidden {given.hidden}"
    table = Table(title=title)
    for column in ("logits", "s (min..max)", "of it forward", "ratio", "peak MiB"):
        table.add_column(column, justify="left" if column == "logits" else "right")
    base = median(run["s"] for run in found[WHOLE])
    rows = []
    for name, runs in found.items():
        times = [run["s"] for run in runs]
        middle, peak = median(times), median(run["peak_bytes"] for run in runs)
        forward = median(run["forward_s"] for run in runs)
        table.add_row(
            name if name in (TORCH, WHOLE) else f"chunks of {name}",
            f"{middle:.2f} ({min(times):.2f}..{max(times):.2f})",
            f"{forward:.2f}",
            f"{middle / base:.2f}",
            f"{peak / 2**20:.0f}",
        )
        rows.append({"vocab": vocab, "precision": precision, "contestant": name, "runs": runs})
    Console(width=110).print(table)
    return rows


if __name__ == "__main__":
    main()
