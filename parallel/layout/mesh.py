"""Which rank stands where: tensor index fastest, then data, then pipeline."""

from __future__ import annotations

from typing import NamedTuple

from holdfast.parallel.errors import ConfigError


class Coordinates(NamedTuple):
    """A rank's index along each mesh axis."""

    tensor: int
    data: int
    pipeline: int


class Mesh(NamedTuple):
    """The sizes of the mesh axes. rank = tensor + T * (data + D * pipeline)."""

    tensor: int
    data: int
    pipeline: int

    @property
    def size(self) -> int:
        return self.tensor * self.data * self.pipeline

    def rank(self, tensor_index: int, data_index: int, pipeline_index: int) -> int:
        return tensor_index + self.tensor * (data_index + self.data * pipeline_index)

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.size:
            raise ConfigError(f"rank {rank} is outside the mesh; ranks are 0 to {self.size - 1}")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(tensor, data, pipeline)

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        at = self.coordinates(rank)
        return tuple(self.rank(t, at.data, at.pipeline) for t in range(self.tensor))

    def data_group(self, rank: int) -> tuple[int, ...]:
        at = self.coordinates(rank)
        return tuple(self.rank(at.tensor, d, at.pipeline) for d in range(self.data))

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        at = self.coordinates(rank)
        return tuple(self.rank(at.tensor, at.data, p) for p in range(self.pipeline))
