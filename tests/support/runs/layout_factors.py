"""What can be chosen of a run and its layout, and the small runs on which each choice is tried."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import msgspec

from holdfast.parallel.schedules import SCHEDULES
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.rules import problems_of
from support.runs.covering import Choice, Cost, Factor, Value, choices
from support.runs.small_runs import make_config

MOST_RANKS = 8
MOST_LAYERS = 14
PARTS = 4
"""The tensor shards, and the slices of a sequence, of a run that has several."""
AXES = ("tensor", "context", "pipeline", "data")
POWERS = (1, 2, 4)
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "train": ("recompute", "precision", "context_chunks"),
    "data": ("packing",),
    "numerics": ("tensor_shards",),
}
"""The sections of the keys outside `[parallel]`."""
CONSTANTS = ("tensor_shards", "context_chunks", "precision", "packing")
"""What fixes the bits of a run, and is no part of its layout."""


def ranks_of(choice: Choice) -> int:
    """The ranks of a layout, or of those of its axes that are chosen."""
    return prod(int(choice.get(axis, 1)) for axis in AXES)


def fits(choice: Choice) -> bool:
    """Whether a choice has few ranks, and is not the same as another: interleaved 1F1B of one chunk
    a rank is 1F1B.
    """
    schedule = choice.get("schedule"), choice.get("virtual")
    return ranks_of(choice) <= MOST_RANKS and schedule != ("interleaved-1f1b", 1)


def is_legal(choice: Choice) -> bool:
    """Whether the program takes the configuration of a choice."""
    return not problems_of(config_of(choice, steps=1))


def _several(*names: str) -> Callable[[Choice], bool]:
    return lambda choice: prod(int(choice[name]) for name in names) > 1


def ruled_factors(
    pipeline: Sequence[int], data: Sequence[int], virtual: Sequence[int], stretches: Sequence[int]
) -> tuple[Factor, ...]:
    """The factors that rules of the configuration bind to each other, with these numbers."""
    return (
        Factor("tensor_shards", (1, PARTS)),
        Factor("context_chunks", (1, PARTS)),
        Factor("tensor", POWERS),
        Factor("context", POWERS),
        Factor("pipeline", tuple(pipeline)),
        Factor("data", tuple(data)),
        Factor("context_exchange", ("heads", "keys"), _several("context")),
        Factor("sequence_parallel", (True, False), _several("tensor")),
        Factor("virtual", tuple(virtual), _several("pipeline")),
        Factor("schedule", tuple(SCHEDULES), _several("pipeline")),
        Factor("stretches", tuple(stretches), _several("context_chunks")),
        Factor("shard", ("optimizer", "gradients", "parameters"), _several("data", "context")),
    )


POWERS_OF_TWO = ruled_factors(POWERS, POWERS, (1, 2), (1, 2))
ALL_NUMBERS = ruled_factors(range(1, 9), range(1, 9), (1, 2, 3), POWERS)
RECOMPUTE = Factor("recompute", ("none", "selective", "full"))
PRECISION = Factor("precision", ("fp32", "bf16"))
PACKING = Factor("packing", ("concatenated", "documents"))
FREE = (RECOMPUTE, PRECISION, PACKING)
"""The factors of which each value goes with all values of the others."""


def legal(ruled: Sequence[Factor], free: Sequence[Factor] = FREE) -> Iterator[Choice]:
    """Every legal choice of up to eight ranks."""
    for choice in choices(ruled, fits):
        if is_legal(choice):
            yield from choices(free, fits, choice)


@cache
def every_layout() -> tuple[Choice, ...]:
    """Every legal layout of up to eight ranks, each with constants that chance chooses. Pure."""
    found: dict[tuple[tuple[str, Value], ...], list[Choice]] = {}
    for choice in legal(ALL_NUMBERS, [RECOMPUTE]):
        layout = tuple(item for item in choice.items() if item[0] not in CONSTANTS)
        found.setdefault(layout, []).append(choice)
    chance = random.Random(0)
    return tuple(
        {
            **chance.choice(alike),
            **{factor.name: chance.choice(factor.values) for factor in (PRECISION, PACKING)},
        }
        for alike in found.values()
    )


def _blocks_per_chunk(choice: Choice) -> list[int]:
    """The layers of each model chunk: the embedding and the head are chunks of their own."""
    chunks = int(choice["pipeline"]) * int(choice.get("virtual", 1))
    return [0, *[1] * (chunks - 2), 0] if chunks > 2 else [1, 0][:chunks]


def _micro_batches(choice: Choice) -> int:
    """The micro-batches of a step: with stages, a replica has two or more, else orders of schedules
    would be alike; where they cost little, they fill all stages, too many for an even share.
    """
    stages, replicas = int(choice["pipeline"]), int(choice["data"])
    if choice["tensor"] == choice["context_chunks"] == 1:
        return max(3, max(stages, replicas) | 1)
    return replicas + (stages > 1)


def config_of(choice: Choice, *, steps: int) -> RunConfig:
    """A small run of a choice.

    What is the same in all: an uneven vocabulary, dropout, and fewer key and value heads than the
    largest tensor degree, with bf16 only one. With documents the embeddings are tied, and matrices
    are updated whole, so that this, too, goes with every value.
    """
    keys = {"precision": "fp32", "packing": "concatenated", **choice}
    sections: dict[str, dict[str, Any]] = {
        section: {name: keys.pop(name) for name in names if name in keys}
        for section, names in SECTIONS.items()
    }
    blocks = _blocks_per_chunk(choice)
    sections["train"] |= {
        "steps": steps,
        "seq_len": 32,
        "micro_batch": 1,
        "global_batch": _micro_batches(choice),
    }
    documents = sections["data"]["packing"] == "documents"
    model = {
        "layers": min(sum(blocks), MOST_LAYERS),
        "hidden": 16,
        "heads": 16,
        "head_dim": 4,
        "kv_heads": 1 if sections["train"]["precision"] == "bf16" else 2,
        "intermediate": 24,
        "vocab": 37,
        "tie_embeddings": documents,
    }
    return make_config(
        model=model,
        parallel={**keys, "blocks_per_chunk": blocks},
        optimizer={"block_elements": 256, "name": "muon" if documents else "adamw"},
        **sections,
    )


def undisturbed(config: RunConfig) -> RunConfig:
    """The run with the same bits in the least layout: of one process, or of one tensor group where
    its degree fixes the bits.
    """
    given, plain = config.parallel, type(config.parallel)()
    if config.numerics.tensor_shards == 1:
        plain = msgspec.structs.replace(
            plain, tensor=given.tensor, sequence_parallel=given.sequence_parallel
        )
    train = msgspec.structs.replace(config.train, recompute="none")
    return msgspec.structs.replace(config, parallel=plain, train=train)


def cost_of(choice: Choice) -> Cost:
    """About how long the processes of a choice compute, and those of its undisturbed run. Pure."""
    layers, batch = sum(_blocks_per_chunk(choice)), _micro_batches(choice)
    tensor = int(choice["tensor"]) if choice["tensor_shards"] == 1 else 1
    least = {**choice, "tensor": tensor, "context": 1, "pipeline": 1, "data": 1}
    named = {name: choice[name] for name in CONSTANTS}
    named |= {"sequence_parallel": choice.get("sequence_parallel", "")} if tensor > 1 else {}
    alike = (layers, batch, tensor, *named.items())
    return Cost(_work(choice, layers, batch), _work(least, layers, batch), alike)


def _work(choice: Choice, layers: int, batch: int) -> float:
    """The messages and operators of a step, weighted by what they were seen to cost."""
    tensor, context = int(choice["tensor"]), int(choice["context"])
    operators = max(tensor, int(choice["tensor_shards"]))
    messages = 2 * tensor * (tensor - 1) + (tensor * context if context > 1 else 0)
    passes = {"none": 1.0, "selective": 1.3, "full": 1.6}[str(choice["recompute"])]
    pieces = (layers + 1) * batch * int(choice["context_chunks"])
    return 15 * ranks_of(choice) + pieces * passes * (operators + messages)
