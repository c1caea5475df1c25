"""All layouts of up to eight ranks, at a size that float64 on a small machine replays quickly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from holdfast.trainer.check.tiny import FRACTION_BITS
from holdfast.trainer.config import RunConfig
from support.runs.small_runs import make_config

MOST_RANKS = 8


def tiny(layout: dict[str, Any], model: dict[str, Any], steps: int = 2) -> RunConfig:
    """A tiny float64 configuration; heads allow tensor sizes 1, 2, 4 and 8, 8 sharing kv heads.

    The second step begins with what the first has changed.
    """
    chunks = layout.get("pipeline", 1) * layout.get("virtual", 1)
    shape = {
        "layers": max(2, chunks),
        "hidden": 16,
        "intermediate": 24,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 20,
        "dropout": 0.1,
    }
    if layout.get("tensor", 1) == 8:
        shape |= {"heads": 8, "kv_heads": 2}
    is_fast = layout.get("context_exchange") == "ring"
    return make_config(
        model={**shape, **model},
        train={
            "precision": "fp64",
            "steps": steps,
            "seq_len": 8,
            "global_batch": 8 if layout.get("data", 1) <= 4 else 16,
            "micro_batch": 2,
        },
        optimizer={"lr": 1e-3, "warmup_steps": 1, "block_elements": 64},
        numerics={"reduction": "fast"} if is_fast else {"fraction_bits": FRACTION_BITS},
        parallel=layout,
    )


def in_slices(config: RunConfig, chunks: int, packing: str = "concatenated") -> RunConfig:
    """The configuration with sequences of 16 tokens in slices, or with documents."""
    return msgspec.structs.replace(
        config,
        train=msgspec.structs.replace(config.train, seq_len=16, context_chunks=chunks),
        data=msgspec.structs.replace(config.data, packing=packing),
    )


def all_layouts() -> Iterator[dict[str, Any]]:
    """tensor x pipeline x data of up to eight ranks, each with one and with two chunks per rank."""
    for tensor in (1, 2, 4, 8):
        for pipeline in range(1, MOST_RANKS + 1):
            for data in range(1, MOST_RANKS + 1):
                if tensor * pipeline * data > MOST_RANKS:
                    continue
                base = {"tensor": tensor, "pipeline": pipeline, "data": data}
                yield {**base, "schedule": "1f1b"}
                if pipeline > 1:
                    yield {**base, "virtual": 2, "schedule": "interleaved-1f1b"}


def as_plain(config: RunConfig) -> dict[str, Any]:
    return msgspec.to_builtins(config)
