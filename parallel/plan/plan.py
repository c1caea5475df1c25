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

from holdfast.parallel.layout import Box, LayerSpec, Mesh, ParameterSpec, StageReplicas
from holdfast.parallel.plan.ownership import Block, BlockKey, blocks, spread_owners

_T = TypeVar("_T")

MicroBatchAssignment = tuple[tuple[tuple[int, ...], ...], ...]
"""Stage -> replica -> micro-batches."""

Shard = Literal["optimizer", "gradients", "parameters"]
"""What the replicas of a stage share: the optimizer's state alone, sums of gradients as well, or
parameters as well."""

_HOLDING = frozenset({"layers", "block_elements", "stage_replicas", "placement", "chunk_layers"})
_PROGRAM = frozenset({"schedule", "virtual", "stage_replicas"})
DERIVED_FROM: Mapping[str, frozenset[str]] = {
    "blocks": frozenset({"layers", "block_elements"}),
    "even owners": _HOLDING,
    "owned blocks": _HOLDING | {"given_owners"},
    "holders": frozenset({"stage_replicas"}),
    "tied layers": frozenset({"layers"}),
    "shard groups": frozenset({"stage_replicas", "shard", "shard_group"}),
    "shard positions": frozenset({"stage_replicas", "shard", "shard_group"}),
    "computing replicas": frozenset({"stage_replicas", "micro_batches", "assignment"}),
    "regular programs": _PROGRAM,
    "regular timeline": _PROGRAM | {"micro_batches"},
    "row places": frozenset({"micro_batches"}),
    "scheduled programs": _PROGRAM
    | {"layers", "placement", "chunk_layers", "micro_batches", "assignment"}
    | {"configured_mesh", "configured_layers", "activation_headroom"},
}
"""Derived value -> the fields of a plan that it depends on. `Plan.evolved` keeps a derived value
exactly where none of these change."""


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
    shard: Shard = "optimizer"
    shard_group: int = 0
    """The ranks over which `shard` is done, at least; 0: all replicas of a stage."""
    assignment: MicroBatchAssignment | None = None
    """The micro-batches of each stage replica if stages differ; None: each replica computes its
    own."""
    given_owners: tuple[tuple[int, ...], ...] | None = None
    """By shard index, the owner of each block if it follows from the plan before; None: the even
    split of a first plan."""
    shadows: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """By shard index, the ranks that shadow each block; empty without redundancy."""
    incoming: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """By shard index, the ranks that each block is incoming on: they get it for the next plan and
    follow its updates meanwhile. Empty if no state is on its way. See admission.py."""
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
        """The optimizer blocks of each shard index."""
        return self.derived(
            "blocks",
            None,
            lambda: tuple(
                blocks(self.layers, index, self.block_elements)
                for index in range(len(self.layers[0].parameters))
            ),
        )

    @property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """The rank that owns each block, by shard index."""
        if self.given_owners is not None:
            return self.given_owners
        return self.derived(
            "even owners",
            None,
            lambda: tuple(
                spread_owners(
                    [block.elements for block in found],
                    [self.holders_of_layer(index, block.layer) for block in found],
                )
                for index, found in enumerate(self.blocks)
            ),
        )

    def followers(self, shard_index: int, place: int) -> tuple[int, ...]:
        """The ranks beside the owner that get a block's gradients.

        These are its shadows, and the ranks that the block is incoming on.
        """
        shadows = self.shadows[shard_index][place] if self.shadows else ()
        return shadows + (self.incoming[shard_index][place] if self.incoming else ())

    def owned_blocks(self, rank: int) -> tuple[BlockKey, ...]:
        """The blocks that a rank owns, in the order of its buffers."""

        def find() -> dict[int, tuple[BlockKey, ...]]:
            found: dict[int, list[BlockKey]] = {}
            for index, owners in enumerate(self.owners):
                for place, owner in enumerate(owners):
                    found.setdefault(owner, []).append((index, place))
            return {owner: tuple(keys) for owner, keys in found.items()}

        return self.derived("owned blocks", None, find).get(rank, ())

    def axis_groups(self, rank: int) -> dict[str, tuple[int, ...]]:
        """By axis inside a stage replica, the ranks that differ from one along that axis only.

        With several axes, "shards" has all ranks of the stage replica. Axes that are not available
        yet are left out if they have a single rank.
        """
        mesh, replica = self.configured_mesh, self.stage_replicas.stage_replica(rank)
        shard = self.stage_replicas.shard_index(rank)
        groups = {
            axis: tuple(replica[other] for other in mesh.peers(axis, shard))
            if len(replica) > 1
            else replica
            for axis in mesh.axes_inside
        }
        return groups if len(groups) == 1 else {**groups, "shards": replica}

    def chunk_of_layer(self, layer: int) -> int:
        """The model chunk that has a layer."""
        return bisect_right(self.chunk_layers, (layer, len(self.layers))) - 1

    def holders_of_layer(self, shard_index: int, layer: int) -> tuple[int, ...]:
        """The ranks, one per data replica, that hold a layer at a shard index."""
        stage = self.placement[self.chunk_of_layer(layer)]
        return self.derived(
            "holders",
            (shard_index, stage),
            lambda: tuple(
                self.stage_replicas.rank(shard_index, replica, stage)
                for replica in range(self.stage_replicas.replicas(stage))
            ),
        )

    def tied_layers(self, shard_index: int, block: Block) -> tuple[int, ...]:
        """The layers with a second use of a block's parameter."""
        name = self.layers[block.layer].parameters[shard_index][block.spec_index].name
        return self._tied_layers().get(name, ())

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

    def layers_of(self, chunk: int) -> range:
        """The layers of a model chunk."""
        return range(*self.chunk_layers[chunk])

    def activation_bytes(self, layers: tuple[int, int]) -> int:
        """The bytes that layers [first, second) keep of one micro-batch."""
        return sum(layer.activation_bytes for layer in self.layers[slice(*layers)])

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
