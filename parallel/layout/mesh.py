"""The axes of the mesh, and the coordinates of each rank in it.

The axes are one table. The axes inside a stage replica come first: their ranks together hold a
stage once, and a rank's position among them is its *shard index*. The replicas and the stages
follow:

    rank = shard + shards * (data + data_size * pipeline)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout.slices import slices_of


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of the mesh: a way of dividing the work between ranks."""

    name: str
    """The axis' name, also the key of its degree in the section `parallel` of a configuration."""
    meaning: str
    """What the ranks of the axis divide."""
    in_stage_replica: bool
    """Whether its ranks together hold a stage once; otherwise each holds a copy."""
    splits_parameters: bool = False
    """Inside a stage replica, whether its ranks hold parts of the parameters rather than copies."""
    is_optional: bool = False
    """Whether it is left out, of texts and of groups, where it has a single rank."""


AXES: Mapping[str, Axis] = {
    "tensor": Axis(
        "tensor",
        "the matrices of every layer",
        in_stage_replica=True,
        splits_parameters=True,
    ),
    "context": Axis(
        "context",
        "the tokens of every sequence",
        in_stage_replica=True,
        is_optional=True,
    ),
    "data": Axis("data", "the micro-batches of a step", in_stage_replica=False),
    "pipeline": Axis("pipeline", "the layers of the model", in_stage_replica=False),
}
"""All axes by name. Ranks are numbered along those inside a stage replica first, in this order."""


class Coordinates(NamedTuple):
    """A rank's index in its stage replica, among the replicas of its stage, and in the pipeline."""

    shard: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Mesh:
    """The degree of each axis. `Mesh.of(tensor=2, data=4)` is the usual way to make one."""

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]
    """The degrees in the order of `axes`."""
    tensor_shards: int = 1
    """The parts of each layer along the tensor axis, of which each rank holds as many as the
    others; 1: one for each rank."""
    slices: int = 1
    """The slices of what passes the layers at once, a sequence or a stretch of it: a multiple of
    the context degree."""
    sequence_parallel: bool = False
    """Whether the ranks of a tensor group have a share of each slice's tokens between layers."""

    @staticmethod
    def of(**sizes: int) -> Mesh:
        """The mesh of these degrees along `AXES`; an axis without one has a single rank.

        Raises:
            ConfigError: an axis does not exist, or a degree is below 1.
        """
        for name, size in sizes.items():
            if name not in AXES:
                raise ConfigError(f"{name} is not an axis of the mesh; there are {', '.join(AXES)}")
            if size < 1:
                raise ConfigError(f"parallel.{name} = {size} is too small; use 1 or more")
        return Mesh(tuple(AXES.values()), tuple(sizes.get(name, 1) for name in AXES))

    @property
    def text(self) -> str:
        """The axes in use, for people: e.g. "tensor 2 x pipeline 1 x data 4"."""
        return f"{self.stage_replica_text} x pipeline {self.pipeline} x data {self.data}"

    @property
    def stage_replica_text(self) -> str:
        """The axes that divide a stage replica, for people: e.g. "tensor 2 x context 4"."""
        shards = f" ({self.tensor_shards} shards)" if self.tensor_shards > 1 else ""
        return " x ".join(
            f"{axis} {self[axis]}{shards if axis == 'tensor' else ''}" for axis in self.axes_inside
        )

    def shard_text(self, shard_index: int) -> str:
        """A shard's coordinates in its stage replica, for people: e.g. "tensor 1, context 0"."""
        here = self.along(shard_index)
        return ", ".join(f"{axis} {here[axis]}" for axis in self.axes_inside)

    def __getitem__(self, axis: str) -> int:
        """The degree of an axis."""
        return self.by_axis[axis]

    @cached_property
    def by_axis(self) -> Mapping[str, int]:
        """The degree of each axis by its name."""
        return {axis.name: size for axis, size in zip(self.axes, self.sizes, strict=True)}

    @cached_property
    def tensor(self) -> int:
        return self["tensor"]

    @cached_property
    def data(self) -> int:
        return self["data"]

    @cached_property
    def pipeline(self) -> int:
        return self["pipeline"]

    @cached_property
    def size(self) -> int:
        return prod(self.sizes)

    @cached_property
    def shards(self) -> int:
        """The number of ranks of a stage replica."""
        return prod(size for _, size in self._inside())

    def rank(self, shard_index: int, data_index: int, pipeline_index: int) -> int:
        return shard_index + self.shards * (data_index + self.data * pipeline_index)

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a rank.

        Raises:
            ConfigError: the mesh has no such rank.
        """
        if not 0 <= rank < self.size:
            raise ConfigError(f"rank {rank} is outside the mesh; ranks are 0 to {self.size - 1}")
        rest, shard = divmod(rank, self.shards)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(shard, data, pipeline)

    @cached_property
    def parts(self) -> int:
        """The number of parts that a stage's parameters are split into; other shards are copies."""
        return prod(parts for _, _, parts in self._splitting())

    @cached_property
    def copies(self) -> int:
        """The number of ranks of a stage replica that hold the same parts of the parameters."""
        return self.shards // prod(size for _, size, _ in self._splitting())

    @cached_property
    def _parts_of_shards(self) -> tuple[tuple[int, ...], ...]:
        found = []
        for shard in range(self.shards):
            here, own, step = self.along(shard), [0], 1
            for axis, size, parts in self._splitting():
                each = parts // size
                steps = [step * (here[axis.name] * each + number) for number in range(each)]
                own = [before + further for further in steps for before in own]
                step *= parts
            found.append(tuple(own))
        return tuple(found)

    def parts_of(self, shard_index: int) -> tuple[int, ...]:
        """The parts of the parameters that a shard holds. Their other holders are copies of it."""
        return self._parts_of_shards[shard_index]

    @cached_property
    def shards_of_part(self) -> tuple[tuple[int, ...], ...]:
        """The shards that hold each part of the parameters, ascending."""
        found: list[list[int]] = [[] for _ in range(self.parts)]
        for shard, parts in enumerate(self._parts_of_shards):
            for part in parts:
                found[part].append(shard)
        return tuple(map(tuple, found))

    @cached_property
    def by_replica_size(self) -> Mapping[int, Mesh]:
        """The meshes of the stage replicas that compute the same bits, by their number of ranks.

        The full size comes first. A smaller one has a divisor of the tensor degree, if the number
        of parts is a constant of the run, and a divisor of the context degree; of equal sizes, the
        one with the larger tensor degree, whose ranks have fewer parameters.
        """
        tensors = _divisors(self.tensor) if self.tensor_shards > 1 else [self.tensor]
        found: dict[int, Mesh] = {}
        for tensor in tensors:
            for context in _divisors(self["context"]):
                degrees = {"tensor": tensor, "context": context}
                sizes = zip(self.axes, self.sizes, strict=True)
                smaller = tuple(degrees.get(axis.name, size) for axis, size in sizes)
                mesh = self if smaller == self.sizes else replace(self, sizes=smaller)
                found.setdefault(mesh.shards, mesh)
        return {size: found[size] for size in sorted(found, reverse=True)}

    @property
    def units_of_slice(self) -> int:
        """The units of tokens of a slice; see `token_units`."""
        return max(self.tensor, self.tensor_shards) if self.sequence_parallel else 1

    @property
    def units(self) -> int:
        """The units of tokens of what passes the layers at once."""
        return self.slices * self.units_of_slice

    @cached_property
    def token_units(self) -> tuple[tuple[int, ...], ...]:
        """By shard, the tokens of its hidden states between layers, in the order of their rows.

        A unit is the share of them that no replica divides further: a slice, or with sequence
        parallelism one of its parts.
        """
        each = self.units_of_slice
        found = []
        for shard in range(self.shards):
            here = self.along(shard)
            share = each // self.tensor if self.sequence_parallel else each
            first = here["tensor"] * share if self.sequence_parallel else 0
            chunks, context = self.slices, self["context"]
            slices = slices_of(chunks, chunks, context, here["context"])
            found.append(
                tuple(q * each + first + unit for q in slices.own for unit in range(share))
            )
        return tuple(found)

    @cached_property
    def in_use(self) -> tuple[str, ...]:
        """The axes that are not optional, or that have several ranks."""
        return tuple(a.name for a in self.axes if not a.is_optional or self[a.name] > 1)

    @cached_property
    def axes_inside(self) -> tuple[str, ...]:
        """The axes in use that are inside a stage replica."""
        inside = {axis.name for axis, _ in self._inside()}
        return tuple(name for name in self.in_use if name in inside)

    def along(self, shard_index: int) -> Mapping[str, int]:
        """The index of a shard along each axis inside a stage replica."""
        found: dict[str, int] = {}
        for axis, size in self._inside():
            shard_index, found[axis.name] = divmod(shard_index, size)
        return found

    def place(self, rank: int) -> Mapping[str, int]:
        """A rank's index along every axis."""
        at = self.coordinates(rank)
        return {**self.along(at.shard), "data": at.data, "pipeline": at.pipeline}

    def peers(self, axis: str, shard_index: int) -> tuple[int, ...]:
        """The shard indices that differ from one along one axis only, with itself, ascending."""
        here = {**self.along(shard_index), axis: None}
        return tuple(
            other for other in range(self.shards) if {**self.along(other), axis: None} == here
        )

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """The ranks of all stages with a rank's coordinates within its stage."""
        at = self.coordinates(rank)
        return tuple(self.rank(at.shard, at.data, stage) for stage in range(self.pipeline))

    def _splitting(self) -> list[tuple[Axis, int, int]]:
        """The axes that split parameters, their degrees, and the parts along them."""
        return [
            (axis, size, max(size, self.tensor_shards) if axis.name == "tensor" else size)
            for axis, size in self._inside()
            if axis.splits_parameters
        ]

    def _inside(self) -> list[tuple[Axis, int]]:
        """The axes of a stage replica and their degrees."""
        sized = zip(self.axes, self.sizes, strict=True)
        return [(axis, size) for axis, size in sized if axis.in_stage_replica]


def _divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]
