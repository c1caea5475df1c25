"""The plan: which rank holds which layers, computes which micro-batches and owns which blocks.

A plan is a pure function of layers, mesh and batch: equal on every rank and computed without
communication. Derived values are computed lazily, so that a plan of 100,000 ranks costs only what
is asked of it. Needs no torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from holdfast.parallel.layout import (
    Box,
    HeldRow,
    LayerSpec,
    Mesh,
    ParameterSpec,
    StageReplicas,
    expert_count,
    held_rows,
)
from holdfast.parallel.plan.expert_hosts import (
    Hosts,
    experts_by_rank,
    first_hosts,
    of_all_teams,
    stage_teams,
)
from holdfast.parallel.plan.ownership import (
    Block,
    BlockKey,
    Together,
    blocks,
    first_owners,
    given_together,
    split_matrices,
)

_T = TypeVar("_T")

MicroBatchAssignment = tuple[tuple[tuple[int, ...], ...], ...]
"""Stage -> replica -> micro-batches."""

Shard = Literal["optimizer", "gradients", "parameters"]
"""What the replicas of a stage share: the optimizer's state alone, sums of gradients as well, or
parameters as well."""

_PLACES = frozenset({"stage_replicas", "configured_mesh"})
_EXPERTS = frozenset({"expert_ranks", "expert_copies", "given_hosts"})
_HOLDING = _PLACES | _EXPERTS | {"layers", "block_elements", "placement", "chunk_layers"}
_SHARING = _PLACES | {"shard", "shard_group"}
_PROGRAM = frozenset({"schedule", "virtual", "stretches", "stage_replicas"})
DERIVED_FROM: Mapping[str, frozenset[str]] = {
    "blocks": frozenset({"layers", "block_elements"}),
    "given together": frozenset({"layers", "block_elements"}),
    "even owners": _HOLDING,
    "owned blocks": _HOLDING | {"given_owners"},
    "holders": _PLACES,
    "teams": frozenset({"stage_replicas", "expert_ranks"}),
    "first hosts": frozenset({"stage_replicas", "expert_ranks", "expert_copies"}),
    "experts of layers": frozenset({"layers"}),
    "experts of ranks": _EXPERTS | {"stage_replicas", "layers", "placement", "chunk_layers"},
    "waves of teams": frozenset({"stage_replicas", "micro_batches", "assignment", "slowness"}),
    "contributors": frozenset({"layers"}),
    "blocks of segments": frozenset({"layers", "block_elements"}),
    "tied layers": frozenset({"layers"}),
    "shard groups": _SHARING,
    "shard positions": _SHARING,
    "computing replicas": frozenset({"stage_replicas", "micro_batches", "assignment"}),
    "regular programs": _PROGRAM,
    "regular timeline": _PROGRAM | {"micro_batches"},
    "row places": frozenset({"micro_batches"}),
    "scheduled programs": _PROGRAM
    | {"layers", "placement", "chunk_layers", "micro_batches", "assignment"}
    | {"configured_mesh", "configured_layers", "activation_headroom", "slowness"},
}
"""Derived value -> the fields of a plan that it depends on. `Plan.evolved` keeps a derived value
exactly where none of these change."""


Slowness = tuple[tuple[int, int], ...]
"""(rank, the hundredths of the usual time that it takes for its work), of slow ranks, ascending."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a generation: everything that follows from live ranks, model and batch.

    It has this many fields because they are all that ranks must agree on; one value that is
    compared, sent and kept whole cannot be half new. The other modules of this folder have the
    functions of one rank's part in it: programs, costs, transfers.
    """

    generation: int
    stage_replicas: StageReplicas
    layers: tuple[LayerSpec, ...]
    virtual: int
    """The number of model chunks per pipeline rank."""
    schedule: str
    """A name in the registry of schedules."""
    chunk_layers: tuple[tuple[int, int], ...]
    """The half-open range of layers of each model chunk, in forward order."""
    placement: tuple[int, ...]
    """The pipeline index of each chunk."""
    micro_batches: tuple[tuple[int, ...], ...]
    """The global micro-batch numbers of each data replica, in the order in which it takes them."""
    block_elements: int
    """The size of an optimizer block, in elements."""
    configured_mesh: Mesh
    """The mesh that the run is configured with."""
    configured_layers: tuple[tuple[int, int], ...]
    """`chunk_layers` of the configured mesh."""
    micro_batch_order: str = "ascending"
    """A name in `MICRO_BATCH_ORDERS`."""
    activation_headroom: float = 0.3
    """The additional memory for activations that a rank may use if stages differ, as a share of the
    fullest rank's in the configured mesh."""
    stretches: int = 1
    """The equal parts of each sequence that pass the chunks one after another."""
    shard: Shard = "optimizer"
    shard_group: int = 0
    """The ranks over which `shard` is done, at least; 0: all replicas of a stage."""
    expert_ranks: int = 1
    """The ranks over which the experts of a layer are spread: more than the tensor degree, or as
    many as tensor ranks, which have those of their parts."""
    expert_copies: int = 1
    """The copies of each expert on so many ranks, at first."""
    expert_slots: int = 0
    """The experts of a layer that a rank has at most, where copies follow the loads; 0: they do
    not."""
    slowness: Slowness = ()
    """That for which micro-batches are divided; see speeds.py."""
    given_hosts: tuple[Hosts, ...] | None = None
    """By layer, the ranks of each expert if they follow from the plan before; None: the first
    placement. See expert_hosts.py."""
    coming_hosts: tuple[Hosts, ...] | None = None
    """The placement of the next plan, where state is incoming for it."""
    assignment: MicroBatchAssignment | None = None
    """The micro-batches of each stage replica if stages differ; None: each replica computes its
    own."""
    given_owners: tuple[tuple[int, ...], ...] | None = None
    """By part of the parameters, the owner of each block if it follows from the plan before; None:
    the even split of a first plan."""
    shadows: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """By part, the ranks that shadow each block; empty without redundancy."""
    incoming: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """By part, the ranks that each block is incoming on: they get it for the next plan and follow
    its updates meanwhile. Empty if no state is on its way. See admission.py."""
    _derived: dict[str, dict[Any, Any]] = field(
        default_factory=lambda: {name: {} for name in DERIVED_FROM},
        init=False,
        compare=False,
        repr=False,
    )

    def evolved(self, **changes: Any) -> Plan:
        """The plan with other values of some fields. Pure; the only way from one plan to the next.

        Derived values that depend on no changed field are shared with this plan, also those that
        either plan computes later.
        """
        changed = {name for name, value in changes.items() if self._differs(name, value)}
        plan = replace(self, **changes)
        plan._derived.update(
            (name, known)
            for name, known in self._derived.items()
            if changed.isdisjoint(DERIVED_FROM[name])
        )
        return plan

    def _differs(self, name: str, value: Any) -> bool:
        """Whether a new value of a field can change the values derived from it."""
        if name == "stage_replicas":
            return value.stages != self.stage_replicas.stages  # nothing depends on spares
        if name == "given_owners" and self.given_owners is None and value is not None:
            return value is not self._derived["even owners"].get(None)
        return value is not getattr(self, name)

    @property
    def is_regular(self) -> bool:
        """Whether every micro-batch stays within one replica's pipeline."""
        return self.assignment is None

    def micro_batches_of(self, stage: int, replica: int) -> tuple[int, ...]:
        """The micro-batches that a stage replica computes."""
        if self.assignment is None:
            return self.micro_batches[replica]
        return self.assignment[stage][replica]

    @property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        """The optimizer blocks of each part of the parameters."""
        return self.derived(
            "blocks",
            None,
            lambda: tuple(
                blocks(self.layers, part, self.block_elements)
                for part in range(len(self.layers[0].parameters))
            ),
        )

    def block(self, key: BlockKey) -> Block:
        """A block by its name."""
        part, place = key
        return self.blocks[part][place]

    def spec_of(self, block: Block) -> ParameterSpec:
        """The row of a block's segment in the table of its part."""
        return self.layers[block.layer].parameters[block.part][block.spec_index]

    def blocks_of(self, layer: int, part: int, spec_index: int) -> tuple[Block, ...]:
        """The blocks of a segment: of a row in a part's table, also one that other parts share, or
        that is the second use of a tied weight."""

        def find() -> dict[tuple[int, int, int], tuple[Block, ...]]:
            found: dict[tuple[int, int, int], list[Block]] = {}
            for block in (block for of_part in self.blocks for block in of_part):
                spec = self.spec_of(block)
                uses = [block.layer, *self.tied_layers(block)]
                for copy in spec.copies:
                    for use in uses:
                        row = self._row_of(use, copy, spec.name, block.spec_index)
                        found.setdefault((use, copy, row), []).append(block)
            return {key: tuple(of_segment) for key, of_segment in found.items()}

        return self.derived("blocks of segments", None, find).get((layer, part, spec_index), ())

    def _row_of(self, layer: int, part: int, name: str, first: int) -> int:
        """The row of a tensor in a layer's table: `first`, unless it is the tensor's second use."""
        rows = self.layers[layer].parameters[part]
        if first < len(rows) and rows[first].name == name:
            return first
        return next(index for index, spec in enumerate(rows) if spec.name == name)

    @property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """The rank that owns each block, by part of the parameters."""
        if self.given_owners is not None:
            return self.given_owners
        return self.derived(
            "even owners",
            None,
            lambda: first_owners(self.blocks, self.given_together, self.candidates),
        )

    @property
    def given_together(self) -> tuple[tuple[Together, ...], ...]:
        """The blocks in the order in which ranks are given them: first each matrix that several
        parts have boxes of and that is updated as one, then each part's other blocks."""
        return self.derived(
            "given together",
            None,
            lambda: given_together(self.blocks, split_matrices(self.layers, self.blocks)),
        )

    def candidates(self, keys: Together) -> tuple[int, ...]:
        """The ranks that may own some blocks: those whose sums of one of them are added."""
        first, *others = map(self.block, keys)
        if not others:
            return self.contributors(first)
        specs = [self.spec_of(block) for block in (first, *others)]
        parts = {part for spec in specs for part in spec.summed or spec.copies[:1]}
        return self.ranks_of(tuple(sorted(parts)), self.stage_of_layer(first.layer))

    def owner(self, key: BlockKey) -> int:
        """The rank that owns a block."""
        return self.owners[key[0]][key[1]]

    def followers(self, key: BlockKey) -> tuple[int, ...]:
        """The ranks beside the owner that get a block's gradients.

        These are its shadows, and the ranks that the block is incoming on.
        """
        part, place = key
        shadows = self.shadows[part][place] if self.shadows else ()
        return shadows + (self.incoming[part][place] if self.incoming else ())

    def owned_blocks(self, rank: int) -> tuple[BlockKey, ...]:
        """The blocks that a rank owns, in the order of its buffers: by layer, then by row of its
        table."""

        def find() -> dict[int, tuple[BlockKey, ...]]:
            found: dict[int, list[BlockKey]] = {}
            for part, owners in enumerate(self.owners):
                for place, owner in enumerate(owners):
                    found.setdefault(owner, []).append((part, place))
            return {owner: tuple(sorted(keys, key=self.depth)) for owner, keys in found.items()}

        return self.derived("owned blocks", None, find).get(rank, ())

    def depth(self, key: BlockKey) -> tuple[int, int, BlockKey]:
        """The order of blocks in buffers, in which those of a split matrix follow each other."""
        block = self.block(key)
        return block.layer, block.spec_index, key

    def mesh_of(self, rank: int) -> Mesh:
        """The mesh of a rank's stage replica; the configured one for a spare.

        A stage replica that has lost ranks may have smaller degrees.
        """
        place = self.stage_replicas.find(rank)
        return self.configured_mesh if place is None else self._mesh_at(place.pipeline, place.data)

    def _mesh_at(self, stage: int, replica: int) -> Mesh:
        mesh, size = self.configured_mesh, len(self.stage_replicas.stages[stage][replica])
        return mesh if size == mesh.shards else mesh.by_replica_size[size]

    def axis_groups(self, rank: int) -> dict[str, tuple[int, ...]]:
        """By axis inside a stage replica, the ranks that differ from one along that axis only.

        With several axes, "shards" has all ranks of the stage replica. Optional axes are left out
        if they have a single rank in the configured mesh. Where experts are spread over more than
        tensor ranks, "experts" has the ranks of the team.
        """
        mesh, replica = self.mesh_of(rank), self.stage_replicas.stage_replica(rank)
        shard = self.stage_replicas.shard_index(rank)
        groups = {
            axis: tuple(replica[other] for other in mesh.peers(axis, shard))
            if len(replica) > 1
            else replica
            for axis in self.configured_mesh.axes_inside
        }
        if self.spreads_experts:
            groups["experts"] = self.team_of_rank(rank)
        return groups if len(groups) == 1 else {**groups, "shards": replica}

    def chunk_of_layer(self, layer: int) -> int:
        """The model chunk that has a layer."""
        return bisect_right(self.chunk_layers, (layer, len(self.layers))) - 1

    def parts_of(self, rank: int) -> tuple[int, ...]:
        """The parts of the parameters that a rank holds; those of shard 0 for a spare, which holds
        none."""
        return self.mesh_of(rank).parts_of(self.stage_replicas.shard_index(rank))

    def rows_of(self, rank: int, layer: int) -> list[HeldRow]:
        """The rows of a layer's tables that a rank holds, by part."""
        experts = self.experts_of(rank, layer) if self.spreads_experts else None
        return held_rows(self.layers[layer], layer, self.parts_of(rank), experts)

    @property
    def spreads_experts(self) -> bool:
        """Whether experts have a placement of their own, not that of the parts of tensor ranks."""
        return self.expert_ranks > self.configured_mesh.tensor

    def teams(self, stage: int) -> tuple[range, ...]:
        """The replicas of each team of a stage."""
        return self.derived(
            "teams",
            stage,
            lambda: stage_teams(self.stage_replicas.sizes(stage), self.expert_ranks),
        )

    def team_of(self, stage: int, replica: int) -> range:
        """The replicas of the team of one."""
        return next(team for team in self.teams(stage) if replica in team)

    def team_ranks(self, stage: int) -> list[tuple[int, ...]]:
        """The ranks of each team of a stage, by replica."""
        replicas = self.stage_replicas.stages[stage]
        return [
            tuple(rank for replica in team for rank in replicas[replica])
            for team in self.teams(stage)
        ]

    def team_of_rank(self, rank: int) -> tuple[int, ...]:
        """The ranks of a rank's team, by replica; a spare is alone."""
        at = self.stage_replicas.find(rank)
        if at is None:
            return (rank,)
        return next(ranks for ranks in self.team_ranks(at.pipeline) if rank in ranks)

    def hosts(self, layer: int) -> Hosts:
        """By expert of a layer, the ranks that have it, team after team."""
        if self.given_hosts is not None:
            return self.given_hosts[layer]
        experts = self.derived("experts of layers", layer, lambda: expert_count(self.layers[layer]))
        stage = self.stage_of_layer(layer)

        def first() -> Hosts:
            sizes = experts, self.expert_ranks, self.expert_copies
            return of_all_teams([first_hosts(team, *sizes) for team in self.team_ranks(stage)])

        return self.derived("first hosts", (stage, experts), first)

    def experts_of(self, rank: int, layer: int) -> tuple[int, ...]:
        """The experts of a layer that a rank has, where they are spread."""
        known = self.derived("experts of ranks", layer, lambda: experts_by_rank(self.hosts(layer)))
        return tuple(known.get(rank, ()))

    def ranks_of(self, parts: tuple[int, ...], stage: int) -> tuple[int, ...]:
        """The ranks of a stage that hold one of some parts of its parameters, by replica."""

        def find() -> tuple[int, ...]:
            replicas = self.stage_replicas.stages[stage]
            shards: dict[int, list[int]] = {}
            for size, replica in {len(held): place for place, held in enumerate(replicas)}.items():
                of_part = self._mesh_at(stage, replica).shards_of_part
                shards[size] = sorted({shard for part in parts for shard in of_part[part]})
            return tuple([held[shard] for held in replicas for shard in shards[len(held)]])

        return self.derived("holders", (parts, stage), find)

    def is_guest(self, key: BlockKey) -> bool:
        """Whether the owner of a block does not hold its parameters, but other parts of them."""
        block, owner = self.block(key), self.owner(key)
        spec = self.spec_of(block)
        if spec.expert is not None and self.spreads_experts:
            return owner not in self.holders(block)
        return set(spec.copies).isdisjoint(self.parts_of(owner))

    def stage_of_layer(self, layer: int) -> int:
        """The pipeline index of the stage that has a layer."""
        return self.placement[self.chunk_of_layer(layer)]

    def holders(self, block: Block, layer: int | None = None) -> tuple[int, ...]:
        """The ranks that hold a block at one use.

        Args:
            layer: the layer of the use; None: the first one.
        """
        spec = self.spec_of(block)
        if spec.expert is not None and self.spreads_experts:
            return self.hosts(block.layer)[spec.expert]
        stage = self.stage_of_layer(block.layer if layer is None else layer)
        return self.ranks_of(spec.copies, stage)

    def contributors(self, block: Block, layer: int | None = None) -> tuple[int, ...]:
        """The ranks whose sums of a block's gradients are added, at one use.

        Where each copy sees all of the gradient, these are the holders of the first copy.
        """
        spec = self.spec_of(block)
        if spec.expert is not None and self.spreads_experts:
            return self.hosts(block.layer)[spec.expert]
        stage = self.stage_of_layer(block.layer if layer is None else layer)
        return self.ranks_of(spec.summed or spec.copies[:1], stage)

    @property
    def all_holders_contribute(self) -> bool:
        """Whether the sums of all holders of each block are added."""
        return self.derived(
            "contributors",
            None,
            lambda: all(
                len(spec.copies) == 1 or spec.summed == spec.copies
                for layer in self.layers
                for of_part in layer.parameters
                for spec in of_part
            ),
        )

    def tied_layers(self, block: Block) -> tuple[int, ...]:
        """The layers with a second use of a block's parameter."""
        return self._tied_layers().get(self.spec_of(block).name, ())

    def _tied_layers(self) -> dict[str, tuple[int, ...]]:
        """The layers with a second use of a tied weight, by the weight's logical name."""

        def find() -> dict[str, tuple[int, ...]]:
            found: dict[str, tuple[int, ...]] = {}
            for index, layer in enumerate(self.layers):
                for spec in layer.parameters[0]:
                    if spec.tied_use:
                        found[spec.name] = (*found.get(spec.name, ()), index)
            return found

        return self.derived("tied layers", None, find)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The model chunks that a rank holds, in forward order; none for a spare."""
        place = self.stage_replicas.find(rank)
        if place is None:
            return ()
        return tuple(chunk for chunk, stage in enumerate(self.placement) if stage == place.pipeline)

    def layers_at(self, rank: int) -> list[int]:
        """The layers that a rank holds, in forward order of its chunks."""
        return [layer for chunk in self.chunks_of(rank) for layer in self.layers_of(chunk)]

    def layers_of(self, chunk: int) -> range:
        """The layers of a model chunk."""
        return range(*self.chunk_layers[chunk])

    def activation_bytes(self, layers: tuple[int, int]) -> float:
        """The bytes that layers [first, second) keep of what passes them at once: a micro-batch, or
        a stretch of it."""
        whole = sum(layer.activation_bytes for layer in self.layers[slice(*layers)])
        return whole / self.stretches

    def derived(self, name: str, key: Any, make: Callable[[], _T]) -> _T:
        """A value that is computed from the fields once.

        Args:
            name: the kind of value, a key of `DERIVED_FROM`.
            key: distinguishes values of one kind; hashable.
            make: computes the value from the fields in `DERIVED_FROM`, and from `key`.
        """
        known = self._derived[name]
        if key not in known:
            known[key] = make()
        return known[key]


def block_box(spec: ParameterSpec, block: Block) -> Box:
    """The box of a block in its logical tensor."""
    first = spec.box.start[0]
    return Box(
        (first + block.row_start, *spec.box.start[1:]), (first + block.row_stop, *spec.box.stop[1:])
    )
