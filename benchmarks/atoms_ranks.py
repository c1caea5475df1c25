"""What the ranks of benchmarks/atoms.py do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import Store

from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.step import open_training
from holdfast.trainer.worlds import local_world


@dataclass(frozen=True, slots=True)
class Sizes:
    """The model, and the steps that are timed."""

    layers: int
    hidden: int
    seq_len: int
    precision: str
    repetitions: int


@dataclass(frozen=True, slots=True)
class Atoms:
    """How sequences and layers are cut, and the ranks that have the parts."""

    slices: int = 1
    shards: int = 1
    tensor: int = 1
    context: int = 1
    context_exchange: str = "auto"

    @property
    def ranks(self) -> int:
        return self.tensor * self.context

    def config(self, sizes: Sizes) -> RunConfig:
        model = {
            "family": "llama",
            "layers": sizes.layers,
            "hidden": sizes.hidden,
            "intermediate": 11 * sizes.hidden // 4,
            "heads": 8,
            "kv_heads": 4,
            "vocab": 4096,
            "max_seq_len": sizes.seq_len,
        }
        train = {
            "seq_len": sizes.seq_len,
            "global_batch": 1,
            "micro_batch": 1,
            "context_chunks": self.slices,
            "precision": sizes.precision,
            "device": "cpu",
        }
        parallel = {
            "tensor": self.tensor,
            "context": self.context,
            "context_exchange": self.context_exchange,
        }
        return convert_config(
            {
                "model": model,
                "data": {"kind": "synthetic"},
                "train": train,
                "parallel": parallel,
                "numerics": {"tensor_shards": self.shards},
            }
        )


def measure(
    rank: int, ranks: int, store: Store, *, sizes: Sizes, contestants: Mapping[str, Atoms]
) -> dict[str, list[float]]:
    """Processor seconds of this rank in steps of each contestant, in turn; the first not counted.

    A contestant of fewer ranks has the first of them.
    """
    torch.set_num_threads(1)
    trainings = {
        name: open_training(
            atoms.config(sizes), local_world(rank, atoms.ranks), dist.PrefixStore(name, store)
        )
        for name, atoms in contestants.items()
        if rank < atoms.ranks
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for step in range(sizes.repetitions + 1):
        for name in contestants:
            store.set(f"{rank} begins {name} {step}", "")
            store.wait([f"{other} begins {name} {step}" for other in range(ranks)])
            start = time.process_time()
            if name in trainings:
                training = trainings[name]
                training.compute(step)
                training.vote(*training.reduce())
                training.apply(1e-4)
            found[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in found.items()}
