"""DeepSpeed's description of tensor-parallel shards (universal_checkpoint_info), as rules. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.checkpoint.convert.rules import Rule, RulePart, Strip
from holdfast.checkpoint.convert.sources import PickledObject, plain
from holdfast.parallel.errors import ConfigError

_REFUSED = ("expert_parameter_patterns", "autotp_unsupported_parameter_patterns")


def tensor_parallel_rules(
    info: Mapping[str, Any] | None,
    shapes: Mapping[str, tuple[int, ...]],
    ranks: int,
    where: str,
) -> tuple[Rule, ...]:
    """A rule for each parameter; a parameter without a matching pattern is cut along its rows.

    Args:
        info: the universal_checkpoint_info of the model's state.
        shapes: the shape of each parameter on one tensor-parallel rank.
        ranks: the number of tensor-parallel ranks.
    Raises:
        ConfigError: the information is missing, or rules cannot express it.
    """
    if not info:
        raise ConfigError(
            f"{where} was trained with {ranks} tensor-parallel ranks and does not say how its "
            "parameters are cut (universal_checkpoint_info); say it with --map"
        )
    for key in _REFUSED:
        patterns = _patterns(info, key)
        found = next((n for n in shapes if _fits(n, patterns)), None)
        if found is not None:
            raise ConfigError(f"{where}: {found} is among {key}, which cannot be converted")
    return tuple(_rule(info, name, shape, ranks, where) for name, shape in shapes.items())


def _rule(
    info: Mapping[str, Any], name: str, shape: tuple[int, ...], ranks: int, where: str
) -> Rule:
    def among(key: str) -> bool:
        return _fits(name, _patterns(info, key))

    if among("tp_replicated_parameter_patterns"):
        return Rule(source=name, target=name, form="replicated", fragments="dp")
    if among("parameter_to_average_patterns"):
        return Rule(source=name, target=name, form="mean", fragments="dp")
    if among("parameter_with_row_parallelism_patterns"):
        return Rule(source=name, target=name, form="shard", dim=1, fragments="dp")
    if among("vocabulary_parameter_patterns"):
        strip = Strip(size=int(info["original_vocab_size"]))
        return Rule(source=name, target=name, form="shard", strip=strip, fragments="dp")
    if among("parameter_with_2_sub_params_cat_dim_0"):
        return _joined(name, [shape[0] // 2] * 2, 0)
    for entry in info.get("parameter_with_sub_params") or ():
        told = entry.__dict__ if isinstance(entry, PickledObject) else entry
        if _fits(name, told["patterns"]):
            return _sub_params(name, shape, told, ranks, where)
    return Rule(source=name, target=name, form="shard", fragments="dp")


def _sub_params(
    name: str, shape: tuple[int, ...], told: Mapping[str, Any], ranks: int, where: str
) -> Rule:
    """The rule of a parameter fused of several along `partition_dim`, each cut over all ranks."""
    logical, dim = plain(told["shape"]), int(told["partition_dim"])
    sizes = logical[dim] if len(logical) == len(shape) else None
    if not isinstance(sizes, list) or any(size % ranks for size in sizes):
        raise ConfigError(
            f"{where}: {name} is fused as {logical} along dimension {dim}, and has shape "
            f"{list(shape)} on each of {ranks} ranks; that cannot be converted"
        )
    return _joined(name, [size // ranks for size in sizes], dim)


def _joined(name: str, sizes: Iterable[int], dim: int) -> Rule:
    """The rule of a parameter of which every rank has a slice of each part, one after the other."""
    return Rule(
        source=name,
        form="shard",
        dim=dim,
        fused_dim=dim,
        fragments="dp",
        groups="shards",
        parts=tuple(RulePart(target=name, size=size) for size in sizes),
    )


def _patterns(info: Mapping[str, Any], key: str) -> list[str]:
    return [str(pattern) for pattern in info.get(key) or ()]


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)
