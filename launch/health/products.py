"""A matrix product on each core and device: its rate, and the bits of its result.

Equal operands give equal bits on every core of a processor and on every device of one kind, each
time. So a core whose result differs is broken, however seldom, and so is a node whose digest is not
that of the others.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from holdfast.launch.health.report import LEAST_SHARE, Check, Comparison, failed
from holdfast.parallel.keyed_random import normal_box_, stream_key

_SEED = 20_260_102
_SIDE = 512
"""The side of a matrix on a core: one product takes some milliseconds."""
_DEVICE_SIDE = 4096
_REPETITIONS = 8
_BESIDE_GPUS = 0.3
"""The share of the other nodes' rate that a core must reach where it computes no step."""


def check_cores(cores: Sequence[int] | None = None, *, trains: bool = True) -> list[Check]:
    """The products of all cores of this process, one core after the other. Local.

    Args:
        cores: None: those on which this process may run.
        trains: whether a run computes on the cores; beside GPUs, nodes may have other processors.
    """
    operands = _operands(_SIDE, torch.device("cpu"))
    cores = sorted(os.sched_getaffinity(0)) if cores is None else cores
    digests: dict[str, list[str]] = {}
    rates: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for core in cores:
            found, rate = _on_core(core, operands)
            digests[f"core {core}"] = found
            rates.append(rate)
    finally:
        torch.set_num_threads(threads)
    share = LEAST_SHARE if trains else _BESIDE_GPUS
    return [
        Check("rate of a product, a core", median(rates), "GFLOP/s", "least", share),
        bits_check("bits of a product, cores", digests, "equal" if trains else "told"),
    ]


def check_device(device: torch.device) -> list[Check]:
    """The products of one accelerator. Local."""
    operands = _operands(_DEVICE_SIDE, device)
    digests, rate = _repeated(operands, lambda: torch.cuda.synchronize(device))
    return [
        Check(f"rate of a product, {device}", rate, "GFLOP/s", "least"),
        bits_check(f"bits of a product, {device}", {str(device): digests}),
    ]


def bits_check(
    name: str, digests: Mapping[str, Sequence[str]], comparison: Comparison = "equal"
) -> Check:
    """The check of digests that must all be equal. Pure.

    Args:
        digests: those of equal products, by the core or device that has computed them.
        comparison: with the other nodes.
    """
    counts = Counter(digest for found in digests.values() for digest in found)
    usual = counts.most_common(1)[0][0]
    wrong = {where: n for where, found in digests.items() if (n := _others(found, usual))}
    if wrong:
        told = ", ".join(f"{n} of {len(digests[where])} on {where}" for where, n in wrong.items())
        return failed(name, usual, "", f"equal products have other bits: {told}")
    return Check(name, usual, comparison=comparison)


def _others(digests: Sequence[str], usual: str) -> int:
    return sum(digest != usual for digest in digests)


def _on_core(core: int, operands: tuple[Tensor, Tensor]) -> tuple[list[str], float]:
    """The digests and the rate of a thread that runs on one core only."""
    found: list[tuple[list[str], float]] = []

    def work() -> None:
        os.sched_setaffinity(0, {core})  # of this thread, as is the number of threads that it uses
        torch.set_num_threads(1)
        found.append(_repeated(operands, lambda: None))

    thread = threading.Thread(target=work, name=f"holdfast-core-{core}")
    thread.start()
    thread.join()
    return found[0] if found else ([f"no result on core {core}"], 0.0)


def _repeated(
    operands: tuple[Tensor, Tensor], settle: Callable[[], None]
) -> tuple[list[str], float]:
    """The digests of the same product several times, and the best rate in 10^9 operations/s."""
    digests, best_s = [], float("inf")
    left, right = operands
    for _ in range(_REPETITIONS):
        began_s = perf_counter()
        product = left @ right
        settle()
        best_s = min(best_s, perf_counter() - began_s)
        digests.append(_digest(product))
    return digests, 2 * left.shape[0] ** 3 / best_s / 1e9


def _operands(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two square matrices of keyed draws: float32[side, side]."""
    made = []
    for name in ("left", "right"):
        values = torch.empty(side, side)
        key = stream_key(_SEED, "health", name)
        normal_box_(values, key, row=0, column=0, total_columns=side, std=1.0)
        made.append(values.to(device))
    return made[0], made[1]


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()[:16]
