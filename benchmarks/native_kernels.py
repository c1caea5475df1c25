"""Native kernels beside the torch operation that each stands for, one thread.

Times are of the calling thread's processor, which other work on the machine disturbs least. Bytes
are what the kernel itself has to read and write once (torch's own traffic may differ); the ratio is
native time over torch time, below 1 where the native kernel is faster. HOLDFAST_NATIVE_ISA chooses
the instruction set.

    python benchmarks/native_kernels.py [--elements 4194304] [--repetitions 15] [--only pack]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(__file__))

from rich.console import Console
from rich.table import Table

from harness import Measurement, alternate, machine
from holdfast import _native


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel and its torch counterpart; `*_bytes` is the least traffic of each."""

    name: str
    native: Callable[[], object]
    native_bytes: int
    peer_name: str
    peer: Callable[[], object]
    peer_bytes: int


def cases(n: int) -> tuple[list[Case], list[torch.Tensor]]:
    """The cases, and the tensors whose addresses they use (to be kept as long)."""
    sums, other = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)
    single, single_out = torch.randn(n) * 1e-3, torch.zeros(n)
    half, half_out = single.bfloat16(), torch.zeros(n, dtype=torch.bfloat16)
    double = torch.zeros(n, dtype=torch.float64)
    text = single.numpy().tobytes()
    s, o, f, fo = (x.data_ptr() for x in (sums, other, single, single_out))
    h, ho, d = (x.data_ptr() for x in (half, half_out, double))
    bits, key, stream = 44, 0x1234567, 0x89ABCDE
    dropout = torch.nn.functional.dropout
    tensors = [sums, other, single, single_out, half, half_out, double]
    listed = [
        Case("accumulate_f32", lambda: _native.accumulate_f32(s, f, n, bits), 20 * n,
             "fp32 acc.add_(grad)", lambda: single_out.add_(single), 12 * n),
        Case("accumulate_bf16", lambda: _native.accumulate_bf16(s, h, n, bits), 18 * n,
             "fp32 acc.add_(bf16 grad)", lambda: single_out.add_(half), 10 * n),
        Case("add_i64", lambda: _native.add_i64(s, o, n), 24 * n,
             "int64 add_", lambda: sums.add_(other), 24 * n),
        Case("reduce_convert_f32", lambda: _native.reduce_convert_f32(s, fo, n, bits), 12 * n,
             "float().mul_(), norm", lambda: sums.float().mul_(2.0**-bits).norm(), 12 * n),
        Case("sum_squares_f32", lambda: _native.sum_squares_f32(f, n), 4 * n,
             "norm in float64",
             lambda: torch.linalg.vector_norm(single, dtype=torch.float64), 4 * n),
        Case("crc32c", lambda: _native.crc32c(f, 4 * n), 4 * n,
             "zlib.crc32", lambda: zlib.crc32(text), 4 * n),
        Case("dropout_scale_f32",
             lambda: _native.dropout_scale_f32(fo, f, n, key, stream, 0, 0.1), 8 * n,
             "dropout", lambda: dropout(single, 0.1), 8 * n),
        Case("dropout_scale_bf16",
             lambda: _native.dropout_scale_bf16(ho, h, n, key, stream, 0, 0.1), 4 * n,
             "dropout bf16", lambda: dropout(half, 0.1), 4 * n),
        Case("philox_uint32", lambda: _native.philox_uint32(fo, n, key, stream, 0), 4 * n,
             "bernoulli_", lambda: single_out.bernoulli_(0.9), 4 * n),
        Case("philox_uniform_f32", lambda: _native.philox_uniform_f32(fo, n, key, stream, 0), 4 * n,
             "uniform_", lambda: single_out.uniform_(), 4 * n),
        Case("philox_normal_f32",
             lambda: _native.philox_normal_f32(fo, n, key, stream, 0, 0.0, 0.02), 4 * n,
             "normal_", lambda: single_out.normal_(0.0, 0.02), 4 * n),
        Case("philox_normal_f64",
             lambda: _native.philox_normal_f64(d, n, key, stream, 0, 0.0, 0.02), 8 * n,
             "normal_ float64", lambda: double.normal_(0.0, 0.02), 8 * n),
    ]  # fmt: skip
    return listed, tensors


def packing_cases(n: int) -> tuple[list[Case], list[torch.Tensor]]:
    """Packing and unpacking of sums that need 3 to 6 bytes, beside a copy of the sums."""
    listed: list[Case] = []
    tensors: list[torch.Tensor] = []
    base, copy = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    b = base.data_ptr()
    for width in (3, 4, 5, 6):
        end = 2 ** (8 * width - 1)
        sums = torch.randint(-end, end, (n,))
        packed = torch.zeros(_native.packed_bound(n), dtype=torch.uint8)
        s, p = sums.data_ptr(), packed.data_ptr()
        size = _native.pack_i64(s, n, p)
        peer = ("copy", partial(copy.copy_, sums), 16 * n)
        listed += [
            Case(f"pack_i64, {width} bytes", partial(_native.pack_i64, s, n, p), 8 * n + size,
                 *peer),
            Case(f"unpack_add_i64, {width} bytes",
                 partial(_native.unpack_add_i64, p, size, b, b, n), 16 * n + size, *peer),
        ]  # fmt: skip
        tensors += [sums, packed]
    return listed, [base, copy, *tensors]


def timed(function: Callable[[], object], calls: int) -> Callable[[], float]:
    def run() -> float:
        start = time.thread_time()
        for _ in range(calls):
            function()
        return (time.thread_time() - start) / calls

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    note = f"{arguments.elements} elements, 1 thread, {_native.isa()}"
    table = Table(title="Native kernels", caption=note)
    for column in (
        "kernel",
        "GB/s",
        "ms (min..max)",
        "torch or zlib",
        "GB/s",
        "ms (min..max)",
        "ratio",
    ):
        table.add_column(
            column, justify="left" if column in ("kernel", "torch or zlib") else "right"
        )

    rows: list[dict[str, object]] = []
    listed, _tensors = cases(arguments.elements)
    packing, _packed = packing_cases(arguments.elements)
    calls = max(1, (1 << 20) // arguments.elements)
    for case in (case for case in [*listed, *packing] if arguments.only in case.name):
        contestants = {
            case.name: timed(case.native, calls),
            case.peer_name: timed(case.peer, calls),
        }
        alternate(contestants, 2)
        native, peer = alternate(contestants, arguments.repetitions)
        ratio = native.median_s / peer.median_s

        def columns(row: Measurement, moved_bytes: int) -> tuple[str, str, str]:
            rate = moved_bytes / row.median_s / 1e9
            spread = f"{min(row.times_s) * 1e3:.3f}..{max(row.times_s) * 1e3:.3f}"
            return row.name, f"{rate:.1f}", f"{row.median_s * 1e3:.3f} ({spread})"

        table.add_row(
            *columns(native, case.native_bytes), *columns(peer, case.peer_bytes), f"{ratio:.2f}"
        )
        rows.append(
            {
                "native": asdict(native),
                "native_bytes": case.native_bytes,
                "peer": asdict(peer),
                "peer_bytes": case.peer_bytes,
                "ratio": ratio,
            }
        )
    Console(width=130).print(table)
    if arguments.json:
        record = {"title": "Native kernels", "machine": machine(), "note": note, "rows": rows}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
