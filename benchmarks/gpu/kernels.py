"""The kernels of exact mode against the memory's bandwidth, beside torch's operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holdfast.parallel.optimizer.kernels import native_operations, torch_operations
from holdfast.parallel.optimizer.packing import packed_bytes_bound

BITS = 44


def seconds(run: Callable[[], object], device: str, repetitions: int) -> float:
    """The median time of `run` after three runs that are not counted."""
    times = []
    for number in range(repetitions + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def run(device: str, tiny: bool) -> dict[str, Any]:
    """GB/s of each kernel, of a copy, and the same of torch's operations; bytes by definition."""
    from holdfast.parallel.optimizer.kernels import triton_sums

    count = 2**12 + 5 if tiny else 2**27
    repetitions = 1 if tiny else 10
    generator = torch.Generator().manual_seed(0)
    size = min(count, 2**22)
    draw = torch.randn(size, generator=generator).repeat(-(-count // size))[:count]
    gradient = draw.to(device)
    narrow = gradient.bfloat16()
    sums = torch.zeros(count, dtype=torch.int64, device=device)
    flags = torch.zeros((), dtype=torch.int64, device=device)
    floats = torch.empty(count, device=device)
    other = (gradient.double() * 2.0**38).long()
    room = torch.empty(packed_bytes_bound(count), dtype=torch.uint8, device=device)
    copied = torch.empty_like(sums)
    found: dict[str, Any] = {"elements": count}
    copy = seconds(lambda: copied.copy_(other), device, repetitions)
    found["copy"] = {"ms": copy * 1e3, "GB/s": 16 * count / copy / 1e9}
    contestants = {"triton": triton_sums, "torch": torch_operations}
    for name, operations in contestants.items():
        packed = room[: operations.pack(other, room)]
        ratio = packed.numel() / count
        cases: dict[str, tuple[float, Callable[[], object]]] = {
            "accumulate fp32": (20, lambda o=operations: o.accumulate(sums, gradient, BITS, flags)),
            "accumulate bf16": (18, lambda o=operations: o.accumulate(sums, narrow, BITS, flags)),
            "add integers": (24, lambda o=operations: o.add_integers(sums, other)),
            "convert to fp32": (12, lambda o=operations: o.convert(sums, floats, BITS)),
            "sum of squares": (4, lambda o=operations: o.sum_squares(floats)),
            "pack": (8 + ratio, lambda o=operations: o.pack(other, room)),
            "unpack and add": (
                16 + ratio,
                lambda o=operations, p=packed: o.unpack_add(p, copied, copied),
            ),
        }
        for case, (bytes_each, call) in cases.items():
            took = seconds(call, device, repetitions)
            rate = bytes_each * count / took / 1e9
            found[f"{case}, {name}"] = {
                "ms": took * 1e3,
                "GB/s": rate,
                "of copy": rate / found["copy"]["GB/s"],
            }
    found["bits equal the native kernels'"] = _equals_native(triton_sums, narrow, device)
    return found


def _equals_native(operations: Any, gradient: Tensor, device: str) -> bool:
    part = gradient[: 2**20]
    results = []
    for code, place in ((operations, device), (native_operations, "cpu")):
        sums = torch.zeros(part.numel(), dtype=torch.int64, device=place)
        code.accumulate(
            sums, part.to(place), BITS, torch.zeros((), dtype=torch.int64, device=place)
        )
        results.append(sums.cpu())
    return torch.equal(*results)
