"""What documents cost in attention: python benchmarks/documents.py

Attention forwards and backwards over sequences without borders, over documents in a call each (what
training does), and over documents with one call and a mask (what it could do). Times are processor
time of one thread, in turn. Documents have the lengths of web text: lognormal.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harness import machine
from holdfast.parallel.pipeline import Documents
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.models.decoder.regions import HeadNorms, attend, attend_within
from holdfast.trainer.models.decoder.rotary import RotaryTables
from holdfast.trainer.models.llama.family import LlamaConfig

MICRO_BATCH = 1
MODEL = LlamaConfig(family="llama", layers=1, hidden=512, heads=8, kv_heads=4, vocab=256)


def lengths_of(mean: int, seq_len: int) -> list[int]:
    """Lengths of documents that fill a sequence, the last one cut; lognormal about a mean."""
    random = torch.Generator().manual_seed(1)
    found: list[int] = []
    while sum(found) < seq_len:
        drawn = mean * torch.randn(1, generator=random).mul(1.2).sub(0.72).exp().item()
        found.append(min(max(2, round(drawn)), seq_len - sum(found)))
    return found


def contestants(mean: int, seq_len: int, precision: str) -> dict[str, Callable[[], Any]]:
    dtype = PRECISIONS[precision].dtype
    heads, kv_heads = MODEL.heads, MODEL.kv_heads
    width = (heads + 2 * kv_heads) * MODEL.dim_per_head
    projected = torch.randn(seq_len, MICRO_BATCH, width).to(dtype).requires_grad_()
    tables = RotaryTables.of(MODEL, seq_len, dtype, torch.device("cpu"))
    documents = Documents.of(lengths_of(mean, seq_len), MICRO_BATCH)
    number = torch.arange(len(documents.lengths)).repeat_interleave(torch.tensor(documents.lengths))
    mask = (number[:, None] == number[None]).tril()

    def masked() -> Tensor:
        split = projected.view(seq_len, MICRO_BATCH, heads + 2 * kv_heads, -1).permute(1, 2, 0, 3)
        q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).reshape(seq_len, MICRO_BATCH, -1)

    def both(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        gradient = torch.ones_like(forward())
        return lambda: torch.autograd.grad(forward(), projected, gradient)

    return {
        "without borders": both(lambda: attend(projected, *tables, heads, kv_heads)),
        "a call for each document": both(
            lambda: attend_within(projected, tables, documents, heads, kv_heads, HeadNorms())
        ),
        "one call with a mask": both(masked),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--mean", type=int, nargs="+", default=[50, 250, 1000])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for precision in given.precision:
        for seq_len in given.seq_len:
            for mean in given.mean:
                work = contestants(mean, seq_len, precision)
                times: dict[str, list[float]] = {name: [] for name in work}
                for number in range(1 + given.repetitions):
                    for name, run in work.items():
                        start = time.process_time()
                        run()
                        if number:
                            times[name].append((time.process_time() - start) * 1e3)
                count = len(lengths_of(mean, seq_len))
                sizes = {"precision": precision, "seq_len": seq_len, "documents": count}
                rows.append({**sizes, **times})
    table = Table(title="attention, ms of processor time: median (min..max)")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console(width=150).print(table)
    if given.json:
        record = {"title": "Documents in attention", "machine": machine(), "rows": rows}
        Path(given.json).write_text(json.dumps(record, indent=2) + "\n")


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return f"{median(value):.2f} ({min(value):.2f}..{max(value):.2f})"


if __name__ == "__main__":
    main()
