"""The plan: who holds which layers, computes which micro-batches and owns which blocks.

A pure function of layers, mesh and batch: equal on every rank, computed without communication, and
lazily, so that the plan of 100,000 ranks costs what is asked of it. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from holdfast.parallel.layout import (
    Box,
    Coordinates,
    LayerSpec,
    Layout,
    Mesh,
    ParameterSpec,
    StageReplicas,
)
from holdfast.parallel.plan.ownership import Block, assign_owners, blocks
from holdfast.parallel.plan.rerouting import (
    SCHEDULED_PAIRS,
    merged_program,
    regular_timeline,
    scheduled_programs,
    stage_caps,
)
from holdfast.parallel.schedules import (
    Action,
    Program,
    compute_programs,
    forward_only,
    peak_in_flight,
    with_messages,
)

_T = TypeVar("_T")

MicroBatchAssignment = tuple[tuple[tuple[int, ...], ...], ...]
"""Stage -> replica -> micro-batches."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that follows from the live ranks, the model and the batch."""

    generation: int
    stage_replicas: StageReplicas
    layers: tuple[LayerSpec, ...]
    virtual: int
    schedule: str
    chunk_layers: tuple[tuple[int, int], ...]
    """The half-open range of layers of each model chunk, in forward order."""
    placement: tuple[int, ...]
    """The pipeline index of each chunk."""
    micro_batches: tuple[tuple[int, ...], ...]
    """The global micro-batch numbers of each data replica, in the order in which it takes them."""
    block_elements: int
    configured_mesh: Mesh
    """The mesh that the run is configured with."""
    configured_layers: tuple[tuple[int, int], ...]
    """`chunk_layers` of that mesh."""
    micro_batch_order: str = "ascending"
    activation_headroom: float = 0.3
    """How much more memory than regularly ranks may use for activations where stages differ."""
    assignment: MicroBatchAssignment | None = None
    """Which micro-batches each stage replica computes, where stages differ; None: each replica's own."""
    given_owners: tuple[tuple[int, ...], ...] | None = None
    """The owners where they follow from what was before; None: the even split of a first plan."""
    shadows: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """By tensor-parallel index, the ranks that shadow each block; empty without redundancy."""
    incoming: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """By tensor-parallel index, the ranks that are being given each block for the next plan, and follow its
    updates meanwhile; empty where nobody is. See admission.py."""
    _cache: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_regular(self) -> bool:
        """Whether every micro-batch stays within one replica's pipeline."""
        return self.assignment is None

    def micro_batches_of(self, stage: int, replica: int) -> tuple[int, ...]:
        """The micro-batches that a stage replica computes."""
        return (
            self.micro_batches[replica]
            if self.assignment is None
            else self.assignment[stage][replica]
        )

    @property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        """The optimizer blocks of each tensor-parallel index."""
        return self._cached(
            "blocks",
            lambda: tuple(
                blocks(self.layers, index, self.block_elements)
                for index in range(self.stage_replicas.tensor)
            ),
        )

    @property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """The owner's rank of each block, by tensor-parallel index."""
        if self.given_owners is not None:
            return self.given_owners
        return self._cached(
            "owners",
            lambda: tuple(
                assign_owners(
                    [block.elements for block in found],
                    [self.holders_of_layer(index, block.layer) for block in found],
                )
                for index, found in enumerate(self.blocks)
            ),
        )

    def followers(self, tensor_index: int, place: int) -> tuple[int, ...]:
        """The ranks that get a block's gradients beside its owner: shadows, and those it is being given to."""
        shadows = self.shadows[tensor_index][place] if self.shadows else ()
        return shadows + (self.incoming[tensor_index][place] if self.incoming else ())

    def owned_places(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The blocks that a rank owns as (tensor-parallel index, place), in the order of its buffers."""

        def find() -> dict[int, tuple[tuple[int, int], ...]]:
            found: dict[int, list[tuple[int, int]]] = {}
            for index, owners in enumerate(self.owners):
                for place, owner in enumerate(owners):
                    found.setdefault(owner, []).append((index, place))
            return {owner: tuple(places) for owner, places in found.items()}

        return self._cached("owned", find).get(rank, ())

    def chunk_of_layer(self, layer: int) -> int:
        return next(c for c, (a, b) in enumerate(self.chunk_layers) if a <= layer < b)

    def holders_of_layer(self, tensor_index: int, layer: int) -> tuple[int, ...]:
        """The ranks, one per data replica, that hold a layer at a tensor-parallel index."""
        stage = self.placement[self.chunk_of_layer(layer)]
        key = ("holders", tensor_index, stage)
        return self._cached(
            key,
            lambda: tuple(
                self.stage_replicas.rank(tensor_index, replica, stage)
                for replica in range(self.stage_replicas.replicas(stage))
            ),
        )

    def contributors(self, tensor_index: int, block: Block) -> tuple[int, ...]:
        """All ranks that hold a use of a block's parameter, the second use of a tied one included."""
        name = self.layers[block.layer].parameters[tensor_index][block.spec_index].name
        ranks = set(self.holders_of_layer(tensor_index, block.layer))
        for layer in self._tied_layers().get(name, ()):
            ranks.update(self.holders_of_layer(tensor_index, layer))
        return tuple(sorted(ranks))

    def _tied_layers(self) -> dict[str, tuple[int, ...]]:
        """Layers that hold a second use, by the logical name of the weight."""

        def find() -> dict[str, tuple[int, ...]]:
            found: dict[str, tuple[int, ...]] = {}
            for index, layer in enumerate(self.layers):
                for spec in layer.parameters[0]:
                    if spec.tied_use:
                        found[spec.name] = (*found.get(spec.name, ()), index)
            return found

        return self._cached("tied", find)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The model chunks that a rank holds, in forward order; none for a spare."""
        place = self.stage_replicas.find(rank)
        if place is None:
            return ()
        return tuple(chunk for chunk, stage in enumerate(self.placement) if stage == place.pipeline)

    def layers_of(self, chunk: int) -> range:
        return range(*self.chunk_layers[chunk])

    def activation_bytes(self, layers: tuple[int, int]) -> int:
        """What the layers from the first up to before the second keep of one micro-batch."""
        return sum(layer.activation_bytes for layer in self.layers[slice(*layers)])

    def program(self, rank: int, only: frozenset[int] | None = None) -> Program:
        """What a rank does in a training step, with global micro-batch numbers and peers' ranks.

        Args:
            only: leave all other micro-batches out.
        """
        return self._program("train", rank, compute_programs, only)

    def forward_program(self, rank: int) -> Program:
        """What a rank does to evaluate one global batch."""
        return self._program("forward", rank, forward_only)

    def _program(
        self,
        kind: str,
        rank: int,
        generate: Callable[[str, int, int, int], tuple[Program, ...]],
        only: frozenset[int] | None = None,
    ) -> Program:
        at = self.stage_replicas.find(rank)
        if at is None:
            return ()
        if self.assignment is None and only is None:
            numbers = self.micro_batches[at.data]
            local = self._cached(
                (kind, len(numbers)),
                lambda: generate(
                    self.schedule, self.stage_replicas.pipeline, self.virtual, len(numbers)
                ),
            )
            named = tuple(Action(a.op, a.chunk, numbers[a.micro_batch]) for a in local[at.pipeline])
        else:
            named = self._rerouted(kind, at, only, generate)
        replicas = self._replicas
        complete = with_messages(
            {rank: named},
            lambda chunk, micro_batch: self.stage_replicas.rank(
                at.tensor,
                replicas[self.placement[chunk]][micro_batch],
                self.placement[chunk],
            ),
            chunks=len(self.placement),
        )
        return complete[rank]

    @property
    def _replicas(self) -> tuple[dict[int, int], ...]:
        """By stage, the replica that computes each micro-batch."""
        return self._cached(
            "replicas",
            lambda: tuple(
                {
                    number: replica
                    for replica in range(self.stage_replicas.replicas(stage))
                    for number in self.micro_batches_of(stage, replica)
                }
                for stage in range(self.stage_replicas.pipeline)
            ),
        )

    def _rerouted(
        self,
        kind: str,
        at: Coordinates,
        only: frozenset[int] | None,
        generate: Callable[[str, int, int, int], tuple[Program, ...]],
    ) -> Program:
        """The compute actions of a stage replica where activations cross pipelines; see rerouting.py."""
        rows = self.micro_batches
        if only is not None:
            rows = tuple(tuple(m for m in row if m in only) for row in rows)
        pairs = len(self.placement) * sum(map(len, rows))
        if kind == "train" and 0 < pairs <= SCHEDULED_PAIRS:
            replicas, widest = self._replicas, self.stage_replicas.widest
            programs = self._cached(
                (kind, "scheduled", only),
                lambda: scheduled_programs(
                    self.placement,
                    lambda stage, micro_batch: stage * widest + replicas[stage][micro_batch],
                    rows,
                    [
                        sum(self.layers[layer].forward_flops for layer in self.layers_of(chunk))
                        for chunk in range(len(self.placement))
                    ],
                    {
                        stage * widest + replica: cap
                        for stage, cap in enumerate(self._caps())
                        for replica in range(self.stage_replicas.replicas(stage))
                    },
                ),
            )
            return programs.get(at.pipeline * widest + at.data, ())
        places = self._cached(
            "places",
            lambda: {m: place for row in self.micro_batches for place, m in enumerate(row)},
        )
        longest = max(map(len, self.micro_batches))
        timeline = self._cached(
            (kind, "times"),
            lambda: regular_timeline(
                generate(self.schedule, self.stage_replicas.pipeline, self.virtual, longest)
            ),
        )
        mine = self.micro_batches_of(at.pipeline, at.data)
        wanted = mine if only is None else tuple(m for m in mine if m in only)
        return merged_program(wanted, places, timeline, at.pipeline)

    def _caps(self) -> tuple[int, ...]:
        """By stage, the chunk activations that a stage replica may keep at once where stages differ."""

        regular = list(map(self.activation_bytes, self.configured_layers))
        longest = -(-sum(map(len, self.micro_batches)) // self.configured_mesh.data)
        fullest = max(
            peak_in_flight(program, size=regular.__getitem__)
            for program in compute_programs(
                self.schedule, self.configured_mesh.pipeline, self.virtual, longest
            )
        )
        most = (1 + self.activation_headroom) * fullest
        return stage_caps(self.placement, list(map(self.activation_bytes, self.chunk_layers)), most)

    def parameter_layout(self) -> Layout:
        """Which boxes of which logical tensors each rank's parameters are."""
        holdings: dict[int, dict[str, tuple[Box, ...]]] = {}
        for rank in self.stage_replicas.ranks:
            index = self.stage_replicas.tensor_index(rank)
            mine = holdings.setdefault(rank, {})
            for chunk in self.chunks_of(rank):
                for layer in self.layers_of(chunk):
                    for spec in self.layers[layer].parameters[index]:
                        mine[spec.name] = tuple({*mine.get(spec.name, ()), spec.box})
        return Layout(holdings)

    def optimizer_layout(self) -> Layout:
        """Which boxes of which logical tensors each rank keeps optimizer state for."""
        holdings: dict[int, dict[str, tuple[Box, ...]]] = {r: {} for r in self.stage_replicas.ranks}
        for index, found in enumerate(self.blocks):
            for block, owner in zip(found, self.owners[index], strict=True):
                spec = self.layers[block.layer].parameters[index][block.spec_index]
                mine = holdings[owner]
                mine[spec.name] = (*mine.get(spec.name, ()), block_box(spec, block))
        return Layout(holdings)

    def _cached(self, key: object, make: Callable[[], _T]) -> _T:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def block_box(spec: ParameterSpec, block: Block) -> Box:
    """The box of its logical tensor that a block is."""
    first = spec.box.start[0]
    return Box(
        (first + block.row_start, *spec.box.start[1:]), (first + block.row_stop, *spec.box.stop[1:])
    )
