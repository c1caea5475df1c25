"""The ranks that send each other the tokens of their experts. Local."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.parallel.comm import Communicator
from holdfast.parallel.layout import SharePlace
from holdfast.parallel.pipeline.expert_inputs import ExpertInputs

LayerHosts = tuple[tuple[int, ...], ...]
"""By expert of a layer, the members of a team that have it, ascending; one at least."""


@dataclass(frozen=True, slots=True)
class ExpertTeam:
    """The ranks that exchange tokens with their experts: all of them, at the same passages."""

    group: Communicator | None
    """The members; None: this rank alone."""
    sources: tuple[int, ...]
    """By member, the number of the slices that it has tokens of at once: members with equal ones
    have parts of the same slices, in their order."""
    hosts: Mapping[int, LayerHosts]
    """By layer, the members that have each expert."""
    most_slices: int
    """The slices that a member computes at once, at most."""
    joins: bool = False
    """Whether an expert computes all tokens that are there as one matrix, and not slice by slice:
    faster, with other bits in every layout."""
    inputs: ExpertInputs | None = None
    """What is kept of this rank's tokens for the length of a step; None: nothing."""

    @property
    def share(self) -> SharePlace:
        """Which share of the tokens of its slices this rank has."""
        source = self.sources[self.index]
        return SharePlace(self.sources[: self.index].count(source), self.sources.count(source))

    @property
    def index(self) -> int:
        """This rank's place among the members."""
        return 0 if self.group is None else self.group.index

    @staticmethod
    def of_parts(group: Communicator | None, layer: int, experts: int, slices: int) -> ExpertTeam:
        """The team of a tensor group, whose ranks have consecutive experts, as many each.

        Args:
            slices: those that every member computes at once.
        """
        size = 1 if group is None else group.size
        hosts = tuple((expert * size // experts,) for expert in range(experts))
        return ExpertTeam(group, (0,) * size, {layer: hosts}, slices)
