"""The plan of a generation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.mesh import Mesh
from holdfast.parallel.ownership import Block, assign_owners, blocks
from holdfast.parallel.parameters import LayerSpec
from holdfast.parallel.schedule import (
    Action,
    Program,
    compute_programs,
    forward_only,
    placement,
    with_messages,
)


@dataclass(frozen=True)
class Plan:
    generation: int
    mesh: Mesh
    layers: tuple[LayerSpec, ...]
    virtual: int
    schedule: str
    chunk_layers: tuple[tuple[int, int], ...]
    placement: tuple[int, ...]
    micro_batches: tuple[tuple[int, ...], ...]
    block_elements: int
    order: str

    @cached_property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        return tuple(blocks(self.layers, t, self.block_elements) for t in range(self.mesh.tensor))

    def holders_of_layer(self, tensor_index: int, layer: int) -> tuple[int, ...]:
        chunk = next(c for c, (a, b) in enumerate(self.chunk_layers) if a <= layer < b)
        stage = self.placement[chunk]
        return tuple(self.mesh.rank(tensor_index, d, stage) for d in range(self.mesh.data))

    @cached_property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            assign_owners(
                [b.elements for b in found],
                [self.holders_of_layer(t, b.layer) for b in found],
            )
            for t, found in enumerate(self.blocks)
        )

    def contributors(self, tensor_index: int, block: Block) -> tuple[int, ...]:
        spec = self.layers[block.layer].parameters[tensor_index][block.spec_index]
        ranks = set(self.holders_of_layer(tensor_index, block.layer))
        for index, layer in enumerate(self.layers):
            if any(s.tied_use and s.name == spec.name for s in layer.parameters[tensor_index]):
                ranks |= set(self.holders_of_layer(tensor_index, index))
        return tuple(sorted(ranks))

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        stage = self.mesh.coordinates(rank).pipeline
        return tuple(c for c, p in enumerate(self.placement) if p == stage)

    def layers_of(self, chunk: int) -> range:
        return range(*self.chunk_layers[chunk])

    def program(self, rank: int) -> Program:
        return self._program(rank, compute_programs)

    def forward_program(self, rank: int) -> Program:
        return self._program(rank, forward_only)

    def _program(self, rank, generate) -> Program:
        at = self.mesh.coordinates(rank)
        ids = list(self.micro_batches[at.data])
        if self.order == "descending":
            ids.reverse()
        elif self.order == "shuffled":
            random.Random(at.data).shuffle(ids)
        local = generate(self.schedule, self.mesh.pipeline, self.virtual, len(ids))[at.pipeline]
        program = tuple(Action(a.op, a.chunk, ids[a.micro_batch]) for a in local)
        return with_messages(
            {rank: program},
            lambda chunk, _: self.mesh.rank(at.tensor, at.data, self.placement[chunk]),
            chunks=len(self.placement),
        )[rank]


def make_plan(
    layers: Sequence[LayerSpec],
    mesh: Mesh,
    *,
    virtual: int,
    schedule: str,
    micro_batches: int,
    block_elements: int,
    blocks_per_chunk: Sequence[int] | None = None,
    recompute: str = "none",
    micro_batch_order: str = "ascending",
    generation: int = 0,
) -> Plan:
    where = placement(schedule, mesh.pipeline, virtual)
    chunks = len(where)
    count = len(layers) - 2
    if blocks_per_chunk is None:
        if count % chunks:
            raise ConfigError(f"model.layers = {count} is not divisible by {chunks} chunks")
        blocks_per_chunk = [count // chunks] * chunks
    edges = [1]
    for n in blocks_per_chunk:
        edges.append(edges[-1] + n)
    edges[0], edges[-1] = 0, len(layers)
    base, extra = divmod(micro_batches, mesh.data)
    shares, start = [], 0
    for d in range(mesh.data):
        stop = start + base + (d < extra)
        shares.append(tuple(range(start, stop)))
        start = stop
    return Plan(
        generation,
        mesh,
        tuple(layers),
        virtual,
        schedule,
        tuple(zip(edges[:-1], edges[1:], strict=True)),
        where,
        tuple(shares),
        block_elements,
        micro_batch_order,
    )
