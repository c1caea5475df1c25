"""The choice for each layer: keep its activations, send them out, or recompute them. Pure.

Sending costs nothing as long as compute hides the drive, so it is used first. Activations that then
do not fit in memory are recomputed, where an operation saves most bytes. Korthikanti et al. (2022,
section 5) recompute the attention core of every layer alike; here each layer has its own choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import LayerSpec
from holdfast.parallel.offload.policy.estimate import estimate_offload
from holdfast.parallel.plan import Plan, between_stretches_bytes

Ways = Mapping[str, tuple[LayerSpec, ...]]
"""The ways to recompute, by name: all layers of the model under each; equal in all else."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of a rank; 0: none, or unknown."""

    flops_per_s: float = 0.0
    drive_bytes_per_s: float = 0.0
    most_share: float = 0.0
    """The largest share of the rank's activations that may be sent to the drive."""


@dataclass(frozen=True, slots=True, order=True)
class _Switch:
    """The switch of one layer to a way that keeps less."""

    flops_per_byte: float
    layer: int
    number: int
    """The number of the switch within its layer; later ones save less for their operations."""
    way: str


def choose_layers(
    plan: Plan, ways: Ways, *, most_bytes: float, rates: Rates
) -> tuple[LayerSpec, ...]:
    """The plan's layers with as little recomputation as fits. Pure: equal on all ranks.

    For the rank of each pipeline stage that has most micro-batches, switches are made in the order
    of operations per byte saved, until the estimate of its activations (`estimate_offload`) fits. A
    faster drive or more memory never means more recomputation.

    Args:
        plan: the plan of the run's first layout. Layers keep their choice when layers move later.
        ways: the choices for each layer; `plan.layers` are among them.
        most_bytes: the bytes that activations may take on a rank.
    Raises:
        ConfigError: even the choice that keeps least does not fit.
    """
    layers = list(plan.layers)
    replica = max(range(plan.stage_replicas.widest), key=lambda d: (len(plan.micro_batches[d]), -d))
    for stage in range(plan.stage_replicas.pipeline):
        rank = plan.stage_replicas.rank(0, replica, stage)
        held = plan.layers_at(rank)
        changes = sorted(
            change
            for layer in held
            for change in _changes(layer, {name: way[layer] for name, way in ways.items()})
        )
        while (kept := _kept_bytes(plan, rank, layers, rates)) > most_bytes:
            if not changes:
                raise ConfigError(
                    f"train.activation_gib = {most_bytes / 2**30:.4g}: pipeline stage {stage} "
                    f"keeps {kept / 2**30:.4g} GiB even when it recomputes all it can; allow "
                    "that much, offload to a faster drive, or take more stages or a smaller "
                    "micro_batch"
                )
            change = changes.pop(0)
            layers[change.layer] = ways[change.way][change.layer]
    return tuple(layers)


def _kept_bytes(plan: Plan, rank: int, layers: Sequence[LayerSpec], rates: Rates) -> int:
    """The activations that a rank keeps, with what attention keeps between stretches."""
    chosen = plan.evolved(layers=tuple(layers))
    sent = estimate_offload(
        chosen,
        rank,
        most_share=rates.most_share,
        flops_per_s=rates.flops_per_s,
        drive_bytes_per_s=rates.drive_bytes_per_s,
    )
    return sent.activations + between_stretches_bytes(chosen, rank)


def _changes(layer: int, ways: Mapping[str, LayerSpec]) -> list[_Switch]:
    """The ways of one layer that are worth it, each relative to the last: a lower convex hull."""
    left = sorted(ways.items(), key=lambda way: (way[1].recompute_flops, way[1].activation_bytes))
    _, current = left[0]
    found: list[_Switch] = []
    while True:
        nexts = [
            (
                (way.recompute_flops - current.recompute_flops)
                / (current.activation_bytes - way.activation_bytes),
                way.activation_bytes,
                name,
            )
            for name, way in left
            if way.activation_bytes < current.activation_bytes
        ]
        if not nexts:
            return found
        flops_per_byte, _, name = min(nexts)
        current = ways[name]
        found.append(_Switch(flops_per_byte, layer, len(found), name))
