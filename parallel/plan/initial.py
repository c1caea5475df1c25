"""The first plan of a configuration: every replica alike, as even as the numbers allow.

Pure. Needs no torch.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from holdfast.parallel.errors import ConfigError, ScheduleError, unknown_name
from holdfast.parallel.layout import LayerSpec, Mesh, StageReplicas
from holdfast.parallel.plan.plan import Plan, Shard
from holdfast.parallel.schedules import placement


def _shuffled(numbers: list[int], replica: int) -> list[int]:
    mixed = list(numbers)
    random.Random(replica).shuffle(mixed)
    return mixed


MICRO_BATCH_ORDERS: Mapping[str, Callable[[list[int], int], list[int]]] = {
    "ascending": lambda numbers, _: numbers,
    "descending": lambda numbers, _: numbers[::-1],
    "shuffled": _shuffled,
    "dealt": lambda numbers, _: numbers,
}
"""By name, a function from (micro-batches of a replica, its index) to the order in which it takes
them. "dealt": replicas have no runs, but every so many micro-batches one, so that the first ones
are spread over all. The keys are the allowed values of `parallel.micro_batch_order`."""


def make_plan(
    layers: Sequence[LayerSpec],
    mesh: Mesh,
    *,
    virtual: int,
    schedule: str,
    micro_batches: int,
    block_elements: int,
    blocks_per_chunk: Sequence[int] | None = None,
    micro_batch_order: str = "ascending",
    activation_headroom: float = 0.3,
    shard: Shard = "optimizer",
    shard_group: int = 0,
    generation: int = 0,
) -> Plan:
    """The first plan of a run. Pure.

    Args:
        layers: the embedding, every transformer layer, the head; with their parameters by part of
            the mesh.
        virtual: model chunks per pipeline rank.
        schedule: a name in the registry of schedules.
        micro_batches: the micro-batches of a step over all replicas, divided into contiguous runs
            that differ by one.
        block_elements: the size of an optimizer block, in elements.
        blocks_per_chunk: the transformer layers of each chunk, for an uneven split; None for an
            even one.
        micro_batch_order: a name in `MICRO_BATCH_ORDERS`; results do not depend on it.
        activation_headroom, shard, shard_group: see `Plan`; 0 or more.
    Raises:
        ConfigError: the layout does not fit the layers, the batch or the schedule; the message says
            what to change.
    """
    _check_sizes(layers, mesh, block_elements, micro_batch_order)
    try:
        where = placement(schedule, mesh.pipeline, virtual)
    except ScheduleError as error:
        raise ConfigError(str(error)) from error
    if micro_batches < mesh.data:
        raise ConfigError(
            f"a step has {micro_batches} micro-batches, fewer than parallel.data = {mesh.data} "
            "replicas; lower parallel.data or raise train.global_batch"
        )
    edges = _chunk_edges(len(layers) - 2, len(where), blocks_per_chunk)
    return Plan(
        generation=generation,
        stage_replicas=StageReplicas.of_mesh(mesh),
        layers=on_shards(layers, mesh),
        virtual=virtual,
        schedule=schedule,
        chunk_layers=tuple(pairwise(edges)),
        placement=where,
        micro_batches=split_micro_batches(micro_batches, [1] * mesh.data, micro_batch_order),
        block_elements=block_elements,
        configured_mesh=mesh,
        configured_layers=tuple(pairwise(edges)),
        micro_batch_order=micro_batch_order,
        activation_headroom=activation_headroom,
        shard=shard,
        shard_group=shard_group,
    )


def on_shards(layers: Sequence[LayerSpec], mesh: Mesh) -> tuple[LayerSpec, ...]:
    """The layers with what one rank of a stage replica keeps and sends.

    Args:
        layers: the layers with what the ranks that hold the same part of the parameters share.
    """
    if mesh.copies == 1:
        return tuple(layers)
    return tuple(
        replace(
            layer,
            activation_bytes=layer.activation_bytes // mesh.copies,
            output_bytes=layer.output_bytes // mesh.copies,
            keys_bytes=layer.keys_bytes // mesh.copies,
        )
        for layer in layers
    )


def _check_sizes(
    layers: Sequence[LayerSpec], mesh: Mesh, block_elements: int, micro_batch_order: str
) -> None:
    for axis, size in mesh.by_axis.items():
        if size < 1:
            raise ConfigError(f"parallel.{axis} = {size} is too small; use 1 or more")
    for layer in layers:
        if len(layer.parameters) != mesh.parts:
            raise ConfigError(
                f"layer {layer.name} is split into {len(layer.parameters)} parts, but a stage "
                f"replica of {mesh.stage_replica_text} holds {mesh.parts}; describe the layers for "
                "that many"
            )
    if block_elements < 1:
        raise ConfigError(
            f"optimizer.block_elements = {block_elements} is too small; use 1 or more"
        )
    if micro_batch_order not in MICRO_BATCH_ORDERS:
        raise ConfigError(
            unknown_name("parallel.micro_batch_order", micro_batch_order, MICRO_BATCH_ORDERS)
        )


def _chunk_edges(count: int, chunks: int, given: Sequence[int] | None) -> list[int]:
    """The edges of chunks in the list of layers; the first has the embedding, the last the head."""
    if given is None:
        if count % chunks:
            raise ConfigError(
                f"model.layers = {count} is not divisible by parallel.pipeline x parallel.virtual "
                f"= {chunks}; change one of them, or give an uneven split in "
                "parallel.blocks_per_chunk"
            )
        given = [count // chunks] * chunks
    if len(given) != chunks or sum(given) != count:
        raise ConfigError(
            f"parallel.blocks_per_chunk = {list(given)}: must be {chunks} numbers that add up to "
            f"model.layers = {count}"
        )
    if min(given) < 0 or min(given[1:-1], default=1) < 1:
        raise ConfigError(
            f"parallel.blocks_per_chunk = {list(given)}: a chunk would have no layer; each number "
            "must be 1 or more, 0 only for the first and the last, which have the embedding and "
            "the head"
        )
    edges = [1]
    for blocks_of_chunk in given:
        edges.append(edges[-1] + blocks_of_chunk)
    edges[0] = 0
    edges[-1] += 1
    return edges


def micro_batch_counts(count: int, sizes: Sequence[int]) -> list[int]:
    """The micro-batches of each replica, so that the last one is done as early as it can be. Pure.

    A micro-batch takes a replica of half the ranks twice as long: each next one goes to the replica
    that would be done with it first.

    Args:
        sizes: the number of ranks of each replica.
    """
    if len(set(sizes)) == 1:
        base, extra = divmod(count, len(sizes))
        return [base + (replica < extra) for replica in range(len(sizes))]
    total = sum(sizes)
    # What all have in any case; then one by one.
    found = [max(0, count * size // total - 1) for size in sizes]
    heap = [
        (Fraction(done + 1, size), -size, replica)
        for replica, (done, size) in enumerate(zip(found, sizes, strict=True))
    ]
    heapq.heapify(heap)
    for _ in range(count - sum(found)):
        time, size, replica = heap[0]
        found[replica] += 1
        heapq.heapreplace(heap, (time - Fraction(1, size), size, replica))
    return found


def split_micro_batches(
    count: int, sizes: Sequence[int], order: str
) -> tuple[tuple[int, ...], ...]:
    """Contiguous runs of micro-batch numbers, one per replica; see `micro_batch_counts`.

    Args:
        sizes: the number of ranks of each replica.
        order: a name in `MICRO_BATCH_ORDERS`, for the order within each run; "dealt": there are no
            runs, and of the first numbers too each replica has about its share.
    """
    counts = micro_batch_counts(count, sizes)
    if order == "dealt":
        return dealt(counts)
    runs, start = [], 0
    for replica, own in enumerate(counts):
        numbers = list(range(start, start + own))
        runs.append(tuple(MICRO_BATCH_ORDERS[order](numbers, replica)))
        start += own
    return tuple(runs)


def entering_order(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """The micro-batches of all replicas, each one's as fast as it takes them. Pure.

    Args:
        rows: the micro-batches of each replica.
        sizes: the number of ranks of each replica.
    """
    places = (
        ((place + 1) / sizes[row], row, number)
        for row, numbers in enumerate(rows)
        for place, number in enumerate(numbers)
    )
    return [number for _, _, number in sorted(places)]


def dealt(counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Numbers dealt to replicas in turn: each next one to the replica that is due it first."""
    heap = [(Fraction(1, own), replica) for replica, own in enumerate(counts) if own]
    heapq.heapify(heap)
    hands: list[list[int]] = [[] for _ in counts]
    for number in range(sum(counts)):
        due, replica = heap[0]
        hands[replica].append(number)
        heapq.heapreplace(heap, (due + Fraction(1, counts[replica]), replica))
    return tuple(map(tuple, hands))
