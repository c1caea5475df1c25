"""The executor over real processes gives the chain of chunks' results, for any schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.parallel.comm.groups import GlooCommunicator, gloo_device
from holdfast.parallel.pipeline import Passage
from holdfast.parallel.pipeline.executor import Executor, MessageShape, message_tag, receive_order
from holdfast.parallel.schedules import (
    Action,
    Op,
    Program,
    compute_programs,
    placement,
    with_messages,
)
from support.processes.cluster import Cluster

SCHEDULES = [
    ("gpipe", 1),
    ("gpipe", 2),
    ("1f1b", 1),
    ("interleaved-1f1b", 2),
    ("interleaved-1f1b", 3),
    ("zb-h1", 1),
    ("zb-v", 2),
]
CASES = [(*schedule, count) for schedule in SCHEDULES for count in (3, 8)]
"""Schedules, chunks per rank, and micro-batches."""


class AffineChunk:
    """x -> 2 x + (chunk + 1) with its micro-batch in it; records every call."""

    def __init__(self, chunk: int, chunks: int) -> None:
        self.chunk, self.chunks = chunk, chunks
        self.outputs: dict[int, float] = {}
        self.gradients: dict[int, float] = {}
        self.weights: list[int] = []

    def forward(self, passage: Passage, value: Tensor | None) -> Tensor | None:
        base = torch.full((2, 2), float(passage.micro_batch)) if self.chunk == 0 else value
        assert base is not None
        output = 2 * base + (self.chunk + 1)
        self.outputs[passage.micro_batch] = output[0, 0].item()
        return None if self.chunk == self.chunks - 1 else output

    def backward_input(self, passage: Passage, grad_output: Tensor | None) -> Tensor | None:
        assert passage.micro_batch in self.outputs
        last = self.chunk == self.chunks - 1
        gradient = torch.full((2, 2), 1.0 + passage.micro_batch) if last else grad_output
        assert gradient is not None
        gradient = 2 * gradient
        self.gradients[passage.micro_batch] = gradient[0, 0].item()
        return None if self.chunk == 0 else gradient

    def backward(self, passage: Passage, grad_output: Tensor | None) -> Tensor | None:
        gradient = self.backward_input(passage, grad_output)
        self.backward_weight(passage)
        return gradient

    def backward_weight(self, passage: Passage) -> None:
        assert passage.micro_batch in self.gradients
        self.weights.append(passage.micro_batch)


def complete_programs(schedule: str, ranks: int, virtual: int, count: int) -> dict[int, Program]:
    where = placement(schedule, ranks, virtual)
    programs = dict(enumerate(compute_programs(schedule, ranks, virtual, count)))
    return dict(with_messages(programs, lambda chunk, micro_batch: where[chunk]))


def run_chains(rank: int, world_size: int, store: Any, *, steps: int) -> list[dict[int, Any]]:
    """What each chunk of this rank has seen, of each of `CASES`."""
    comm = GlooCommunicator(
        store, "w", range(world_size), rank, device=gloo_device("127.0.0.1"), timeout_s=30
    )
    return [run_chain(comm, rank, world_size, *case, steps) for case in CASES]


def run_chain(
    comm: GlooCommunicator,
    rank: int,
    world_size: int,
    schedule: str,
    virtual: int,
    count: int,
    steps: int,
) -> dict[int, Any]:
    programs = complete_programs(schedule, world_size, virtual, count)
    where = placement(schedule, world_size, virtual)
    total = world_size * virtual
    chunks = {c: AffineChunk(c, total) for c, owner in enumerate(where) if owner == rank}
    message = MessageShape((2, 2), torch.float32, torch.device("cpu"))
    executor = Executor(chunks, total - 1, message, comm, count)
    order = receive_order(programs[rank], programs, rank)
    for _ in range(steps):
        for chunk in chunks.values():
            chunk.weights.clear()
        times = executor.run(programs[rank], order)
        assert len(times.actions) == len(programs[rank])
    return {c: (k.outputs, k.gradients, sorted(k.weights)) for c, k in chunks.items()}


@pytest.fixture(scope="module")
def results_of(cluster: Cluster) -> Callable[[int], list[list[dict[int, Any]]]]:
    """Runs all cases on so many ranks, once: by rank, what it has of each case."""
    return cache(lambda ranks: cluster.run("test_pipeline:run_chains", ranks, steps=2))


@pytest.mark.mp
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_micro_batch_passes_every_chunk(
    results_of: Callable[[int], list[list[dict[int, Any]]]], case: tuple[str, int, int], ranks: int
) -> None:
    _, virtual, count = case
    results = [of_rank[CASES.index(case)] for of_rank in results_of(ranks)]
    seen = {chunk: values for result in results for chunk, values in result.items()}
    total = ranks * virtual
    assert sorted(seen) == list(range(total))
    for micro_batch in range(count):
        value = float(micro_batch)
        for chunk in range(total):
            value = 2 * value + (chunk + 1)
            assert seen[chunk][0][micro_batch] == value
            expected = (1.0 + micro_batch) * 2.0 ** (total - chunk)
            assert seen[chunk][1][micro_batch] == expected
    assert all(values[2] == list(range(count)) for values in seen.values())


def test_tags_are_unique_within_a_step() -> None:
    tags = {
        message_tag(Action(op, chunk, micro_batch, 0, stretch), 7, 3)
        for stretch in range(3)
        for op in (Op.RECEIVE_FORWARD, Op.RECEIVE_BACKWARD)
        for chunk in range(5)
        for micro_batch in range(7)
    }
    assert len(tags) == 2 * 5 * 7 * 3


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_receive_order_follows_the_senders_program(schedule: str, virtual: int) -> None:
    programs = complete_programs(schedule, 4, virtual, 8)
    for rank, program in programs.items():
        order = receive_order(program, programs, rank)
        receives = [a for a in program if a.op in (Op.RECEIVE_FORWARD, Op.RECEIVE_BACKWARD)]
        assert sorted(order, key=str) == sorted(receives, key=str)
        for peer in {a.peer for a in receives if a.peer is not None}:
            sends = [a for a in programs[peer] if a.peer == rank and "SEND" in a.op]
            expected = [
                (s.chunk + 1 if s.op is Op.SEND_FORWARD else s.chunk - 1, s.micro_batch)
                for s in sends
            ]
            mine = sorted((a for a in receives if a.peer == peer), key=order.__getitem__)
            assert [(a.chunk, a.micro_batch) for a in mine] == expected
