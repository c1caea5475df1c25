"""Runs in any layout of up to eight ranks, of a size that float64 replays quickly."""

from __future__ import annotations

from typing import Any

import msgspec

from holdfast.trainer.check.tiny import FRACTION_BITS
from holdfast.trainer.config import RunConfig
from support.runs.small_runs import make_config

MICRO_BATCH = 2


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
            "global_batch": MICRO_BATCH * _micro_batches(layout),
            "micro_batch": MICRO_BATCH,
        },
        optimizer={"lr": 1e-3, "warmup_steps": 1, "block_elements": 64},
        numerics={"reduction": "fast"} if is_fast else {"fraction_bits": FRACTION_BITS},
        parallel=layout,
    )


def _micro_batches(layout: dict[str, Any]) -> int:
    """Enough that each replica has one and stages have several under way; in tensor groups, where
    they cost much and pass one by one, two.
    """
    data = layout.get("data", 1)
    if layout.get("tensor", 1) > 1:
        return max(2, data + (layout.get("pipeline", 1) > 1))
    return 4 if data <= 4 else 8


def in_slices(config: RunConfig, chunks: int, packing: str = "concatenated") -> RunConfig:
    """The configuration with sequences of 16 tokens in slices, or with documents."""
    return msgspec.structs.replace(
        config,
        train=msgspec.structs.replace(config.train, seq_len=16, context_chunks=chunks),
        data=msgspec.structs.replace(config.data, packing=packing),
    )
