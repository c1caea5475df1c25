"""What the ranks of benchmarks/stretches.py do."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import Store

from executor import SHAPE, make_sleeps_exact, sleep_until
from harness import forget_highest, status_bytes
from holdfast.parallel.comm.groups import GlooCommunicator, gloo_device
from holdfast.parallel.pipeline import Executor, MessageShape, Passage, receive_order
from holdfast.parallel.schedules import compute_programs, placement, with_messages
from holdfast.trainer.config import convert_config
from holdfast.trainer.step import open_training
from holdfast.trainer.worlds import local_world

RANKS = 4


@dataclass(frozen=True, slots=True)
class Order:
    """A schedule of sequences in stretches."""

    schedule: str
    virtual: int
    stretches: int
    micro_batches: int


class UnevenChunk:
    """Sleeps for as long as a device would compute: later stretches attend to more."""

    def __init__(self, forward_s: float, stretches: int, attention: float) -> None:
        self._output = torch.zeros(SHAPE)
        even = (1 - attention) / stretches
        self._seconds = [
            forward_s * (even + attention * (2 * number + 1) / stretches**2)
            for number in range(stretches)
        ]

    def _sleep(self, passage: Passage, times: float) -> Tensor:
        sleep_until(time.perf_counter() + times * self._seconds[passage.stretch or 0])
        return self._output

    def forward(self, passage: Passage, value: Tensor | None) -> Tensor:
        return self._sleep(passage, 1.0)

    def backward(self, passage: Passage, grad_output: Tensor | None) -> Tensor:
        return self._sleep(passage, 2.0)

    def backward_input(self, passage: Passage, grad_output: Tensor | None) -> Tensor:
        return self._sleep(passage, 1.0)

    def backward_weight(self, passage: Passage) -> None:
        self._sleep(passage, 1.0)


def emulate(
    rank: int,
    ranks: int,
    store: Store,
    *,
    orders: dict[str, Order],
    forward_s: float,
    attention: float,
    repetitions: int,
) -> dict[str, list[float]]:
    """Seconds of steps in each order, in turn; the first of each is not counted.

    Args:
        forward_s: of a rank's layers for a sequence.
        attention: its share in that.
    """
    make_sleeps_exact()
    comm = GlooCommunicator(
        store, "w", range(ranks), rank, device=gloo_device("127.0.0.1"), timeout_s=60
    )
    found: dict[str, list[float]] = {name: [] for name in orders}
    for repetition in range(repetitions + 1):
        for name, order in orders.items():
            mine = placement(order.schedule, ranks, order.virtual)
            programs = with_messages(
                dict(
                    enumerate(
                        compute_programs(
                            order.schedule,
                            ranks,
                            order.virtual,
                            order.micro_batches,
                            order.stretches,
                        )
                    )
                ),
                lambda chunk, _, mine=mine: mine[chunk],
            )
            chunk = UnevenChunk(forward_s / order.virtual, order.stretches, attention)
            executor = Executor(
                {c: chunk for c, owner in enumerate(mine) if owner == rank},
                len(mine) - 1,
                MessageShape(SHAPE, torch.float32, torch.device("cpu")),
                comm,
                order.micro_batches,
                stretches=order.stretches,
            )
            receives = receive_order(programs[rank], programs, rank)
            comm.barrier()
            start = time.perf_counter()
            executor.run(programs[rank], receives)
            comm.barrier()
            if repetition:
                found[name].append(time.perf_counter() - start)
    return found


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step takes on one rank."""

    bytes: int
    """The most memory beyond that at its begin."""
    loss: str


def train(
    rank: int, ranks: int, store: Store, *, stretches: int, seq_len: int, hidden: int
) -> Taken:
    """Train two steps of few long sequences; the first is not counted."""
    torch.set_num_threads(1)
    config = convert_config(
        {
            "model": {
                "family": "llama",
                "layers": 2 * ranks,
                "hidden": hidden,
                "heads": 8,
                "kv_heads": 2,
                "vocab": 1024,
                "max_seq_len": seq_len,
            },
            "data": {"kind": "synthetic"},
            "train": {
                "seq_len": seq_len,
                "global_batch": ranks,
                "micro_batch": 1,
                "context_chunks": 8,
                "device": "cpu",
                "vocab_chunk": 256,
            },
            "parallel": {"pipeline": ranks, "stretches": stretches},
        }
    )
    training = open_training(config, local_world(rank, ranks), store)
    taken = Taken(0, "")
    for step in range(2):
        forget_highest()
        before = status_bytes("VmRSS")
        training.compute(step)
        outcome = training.vote(*training.reduce())
        training.apply(1e-4)
        training.finish_gather()
        taken = Taken(status_bytes("VmHWM") - before, outcome.loss.hex())
    return taken
