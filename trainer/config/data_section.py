"""The `[data]` section of a configuration. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from holdfast.parallel.errors import DataError


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The source of the tokens.

    Attributes:
        kind: "synthetic" (a seeded Markov chain), "text" (UTF-8 files and folders) or "megatron"
            (`.bin`/`.idx` prefixes).
        path: files, folders or prefixes. Text without a path is the Python standard library.
        tokenizer: "bytes", or the path of a `tokenizer.json`; for text only.
        weights: one per path: the shares of a mixture. Empty: all paths are one corpus.
        eval_fraction: share of every corpus, taken from its end, that is held out, in [0, 1).
        seed: keys the order of the samples; 0: `train.seed` does.
    """

    kind: Literal["synthetic", "text", "megatron"] = "synthetic"
    path: list[str] = []
    tokenizer: str = "bytes"
    weights: list[float] = []
    eval_fraction: float = 0.05
    seed: int = 0


def check_data_config(data: DataConfig) -> None:
    """Check the values that can be checked without touching a file.

    Raises:
        DataError: a value is wrong; the message has the key, its value and what is allowed.
    """
    if not 0 <= data.eval_fraction < 1:
        raise DataError(
            f"data.eval_fraction = {data.eval_fraction}: allowed is 0 (nothing held out) up to, "
            "but not including, 1"
        )
    if data.kind == "megatron" and not data.path:
        raise DataError(
            'data.path = [] with data.kind = "megatron": name at least one prefix of a '
            ".bin/.idx pair (holdfast data prepare writes them)"
        )
    if data.weights and len(data.weights) != len(data.path):
        raise DataError(
            f"data.weights has {len(data.weights)} values and data.path has {len(data.path)}: "
            "give one weight per path, or none"
        )
    for position, weight in enumerate(data.weights):
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(
                f"data.weights[{position}] = {weight}: every weight is a positive number; "
                "leave the path out to use none of it"
            )
