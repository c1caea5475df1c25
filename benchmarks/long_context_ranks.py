"""What the ranks of benchmarks/long_context.py do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.distributed import Store

from harness import forget_highest, status_bytes
from holdfast.trainer.config import convert_config
from holdfast.trainer.step import open_training
from holdfast.trainer.worlds import local_world

SLICES = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    layers: int
    hidden: int
    seq_len: int
    repetitions: int


@dataclass(slots=True)
class Taken:
    """What steps took on one rank."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    bytes: int = 0
    """The most memory in a step beyond that at its begin."""


def measure(
    rank: int, ranks: int, store: Store, *, sizes: Sizes, layout: Mapping[str, object]
) -> Taken:
    """Train; the first step is not counted."""
    torch.set_num_threads(1)
    config = convert_config(
        {
            "model": {
                "family": "llama",
                "layers": sizes.layers,
                "hidden": sizes.hidden,
                "heads": 8,
                "kv_heads": 4,
                "vocab": 1024,
                "max_seq_len": sizes.seq_len,
            },
            "data": {"kind": "synthetic"},
            "train": {
                "seq_len": sizes.seq_len,
                "global_batch": 1,
                "micro_batch": 1,
                "context_chunks": SLICES,
                "device": "cpu",
            },
            "parallel": dict(layout),
            "numerics": {
                "reduction": "fast" if layout.get("context_exchange") == "ring" else "exact"
            },
        }
    )
    training = open_training(config, local_world(rank, ranks), store)
    taken = Taken()
    for step in range(sizes.repetitions + 1):
        forget_highest()
        before, start, cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
        training.compute(step)
        outcome = training.vote(*training.reduce())
        training.apply(1e-4)
        training.finish_gather()
        if step:
            taken.seconds.append(time.perf_counter() - start)
            taken.cpu_s.append(time.process_time() - cpu)
            taken.bytes = max(taken.bytes, status_bytes("VmHWM") - before)
        taken.losses.append(outcome.loss.hex())
    return taken
