"""What the ranks of benchmarks/tensor_strips.py do, each in its own network namespace."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from executor import make_sleeps_exact
from holdfast.parallel.comm.p2p_collectives import Handles
from link_ranks import PORT, Node, enter

RANKS = 2
EXCHANGES = 5
"""Of a sub-layer's hidden state: to its ranks and their sums, likewise backwards, and once more to
have the weights' gradients."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model, and what is timed."""

    layers: int
    hidden: int
    seq_len: int
    strips: tuple[int, ...]
    repetitions: int
    flops_per_s: float
    """Of a device that is emulated, or 0: the products are computed here."""

    def config(self, strips: int) -> Any:
        from holdfast.trainer.config import convert_config

        model = {
            "family": "llama",
            "layers": self.layers,
            "hidden": self.hidden,
            "intermediate": 11 * self.hidden // 4,
            "heads": 8,
            "kv_heads": 4,
            "vocab": 1024,
            "max_seq_len": self.seq_len,
        }
        train = {"seq_len": self.seq_len, "global_batch": 1, "micro_batch": 1, "device": "cpu"}
        parallel = {"tensor": RANKS, "backend": "gloo"}
        numerics = {"tensor_strips": strips}
        data = {"kind": "synthetic"}
        return convert_config(
            {
                "model": model,
                "data": data,
                "train": train,
                "parallel": parallel,
                "numerics": numerics,
            }
        )


class Device(TorchDispatchMode):
    """Sleeps for as long as a device would compute each matrix product.

    Its results are arbitrary. The processors are left to the messages, as a device leaves them.
    """

    def __init__(self, flops_per_s: float) -> None:
        super().__init__()
        self._flops_per_s = flops_per_s

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func not in (aten.mm.default, aten.mm.out, aten.bmm.default):
            return func(*args, **kwargs)
        left, right = args[:2]
        time.sleep(2 * math.prod(left.shape) * right.shape[-1] / self._flops_per_s)
        return (
            kwargs["out"] if "out" in kwargs else left.new_zeros(*left.shape[:-1], right.shape[-1])
        )


def measure(
    rank: int, ranks: int, _: Any, *, nodes: Sequence[Node], sizes: Sizes
) -> dict[str, dict[str, list[float]]]:
    """Seconds of the sub-layer and of steps on this rank, by the number of strips."""
    from holdfast.parallel.tensor_parallel import TensorParallel
    from holdfast.trainer.step import open_training
    from holdfast.trainer.worlds import local_world

    torch.set_num_threads(1)
    make_sleeps_exact()
    enter(nodes[rank])
    store = dist.TCPStore(nodes[rank].master, PORT, ranks, is_master=rank == 0)
    world = replace(local_world(rank, ranks), store_host=nodes[rank].master)
    trainings = {
        strips: open_training(sizes.config(strips), world, dist.PrefixStore(f"{strips}", store))
        for strips in sizes.strips
    }
    group = next(iter(trainings.values())).groups["tensor"]
    alone = sub_layer(sizes, TensorParallel(None, False), ranks)
    work = {n: sub_layer(sizes, TensorParallel(group, True, 1, n), 1) for n in sizes.strips}
    found: dict[str, dict[str, list[float]]] = {"computation": {}, "sub-layer": {}, "step": {}}

    def timed(kind: str, name: str, run: Any) -> None:
        group.barrier()
        with Device(sizes.flops_per_s) if sizes.flops_per_s else nullcontext():
            start = time.perf_counter()
            run()
        found[kind].setdefault(name, []).append(time.perf_counter() - start)

    def each(kind: str, runs: Mapping[int, Any]) -> None:
        with nothing_beside(type(group)):
            timed(kind, "nothing beside", runs[1])
        for strips, run in runs.items():
            timed(kind, f"{strips} strips", run)

    for _repetition in range(sizes.repetitions + 1):
        timed("computation", "", alone)
        each("sub-layer", work)
    for step in range(sizes.repetitions + 1):
        each("step", {n: partial(one_step, training, step) for n, training in trainings.items()})
    return {kind: {name: times[1:] for name, times in rows.items()} for kind, rows in found.items()}


def one_step(training: Any, step: int) -> None:
    training.compute(step)
    training.vote(*training.reduce())
    training.apply(1e-4)


@contextmanager
def nothing_beside(kind: type) -> Iterator[None]:
    """Have communicators of a kind wait for each collective as soon as it has begun.

    Layers without overlap do so: those that they are compared with in T3.
    """

    def waiting(begin: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Handles:
            begin(*args, **kwargs).wait()
            return Handles([])

        return run

    with ExitStack() as patches:
        for name in ("all_gather", "all_to_all"):
            patches.enter_context(mock.patch.object(kind, name, waiting(getattr(kind, name))))
        yield


def sub_layer(sizes: Sizes, tp: Any, parts: int) -> Any:
    """Runs a rank's part of the MLP forwards and backwards, as a step would.

    Args:
        parts: more than 1: compute one of so many parts, without the others.
    """
    import torch.nn.functional as F

    from holdfast.parallel.pipeline import WeightGradientQueue
    from holdfast.parallel.tensor_parallel import column_linear, of_parts, row_linear

    hidden, inner = sizes.hidden, 11 * sizes.hidden // 4 // RANKS
    up = torch.nn.Parameter(torch.randn(2 * inner, hidden) * 0.02)
    down = torch.nn.Parameter(torch.randn(hidden, inner) * 0.02)
    queue = WeightGradientQueue()
    rows = sizes.seq_len // tp.size
    value = torch.randn(rows, 1, hidden, requires_grad=True)
    gradient = torch.randn(rows, 1, hidden)

    def run() -> None:
        (wide,) = column_linear(value, [of_parts([up], queue)], tp)
        gate, more = wide.chunk(2, -1)
        result = row_linear([F.silu(gate) * more], of_parts([down], queue), tp)
        result.backward(gradient)

    return run
