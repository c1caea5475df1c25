"""Stage replicas: the rank at each shard index, replica and stage, regular or not.

A stage replica is a group of ranks that hold one stage once. A run begins with the stage replicas
of its mesh. After losses, stages can have different numbers of replicas, replicas can have fewer
ranks than in the mesh (`Mesh.by_replica_size`), and ranks without a stage replica become spares.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout.mesh import Coordinates, Mesh

StageReplica = tuple[int, ...]
"""The ranks of a stage replica, by shard index."""


@dataclass(frozen=True)
class StageReplicas:
    """The coordinates of all ranks; `rank` and `coordinates` are inverse to each other."""

    stages: tuple[tuple[StageReplica, ...], ...]
    """Stage -> replica -> its ranks."""
    spares: tuple[int, ...] = field(default=())
    """Ranks without coordinates: they hold copies of others' state, and compute nothing."""

    @staticmethod
    def of_mesh(mesh: Mesh) -> StageReplicas:
        return StageReplicas(
            tuple(
                tuple(
                    tuple(mesh.rank(s, replica, stage) for s in range(mesh.shards))
                    for replica in range(mesh.data)
                )
                for stage in range(mesh.pipeline)
            )
        )

    def sizes(self, stage: int) -> tuple[int, ...]:
        """The number of ranks of each replica of a stage."""
        return tuple(map(len, self.stages[stage]))

    @property
    def pipeline(self) -> int:
        """The number of stages."""
        return len(self.stages)

    def replicas(self, stage: int) -> int:
        """The number of replicas of a stage."""
        return len(self.stages[stage])

    @cached_property
    def widest(self) -> int:
        """The number of replicas of the stage that has most."""
        return max(map(len, self.stages))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """All ranks, spares included, in ascending order."""
        placed = (rank for stage in self.stages for held in stage for rank in held)
        return tuple(sorted((*placed, *self.spares)))

    @property
    def size(self) -> int:
        return len(self.ranks)

    def rank(self, shard_index: int, replica: int, stage: int) -> int:
        return self.stages[stage][replica][shard_index]

    @cached_property
    def _places(self) -> dict[int, Coordinates]:
        return {
            rank: Coordinates(shard, replica, stage)
            for stage, replicas in enumerate(self.stages)
            for replica, ranks in enumerate(replicas)
            for shard, rank in enumerate(ranks)
        }

    def find(self, rank: int) -> Coordinates | None:
        """A rank's coordinates; None for a spare and for an unknown rank."""
        return self._places.get(rank)

    def coordinates(self, rank: int) -> Coordinates:
        """A rank's coordinates.

        Raises:
            ConfigError: the rank has none.
        """
        place = self._places.get(rank)
        if place is None:
            raise ConfigError(f"rank {rank} has no place in a layout of {self.size} ranks")
        return place

    def shard_index(self, rank: int) -> int:
        """A rank's index in its stage replica; 0 for a spare."""
        place = self._places.get(rank)
        return place.shard if place is not None else 0

    def stage_replica(self, rank: int) -> StageReplica:
        """The ranks that hold a stage together with a rank; a spare is alone."""
        place = self._places.get(rank)
        return (rank,) if place is None else self.stages[place.pipeline][place.data]
