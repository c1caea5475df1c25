"""The communicators of this rank, made and edited from one generation to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import Store

from holdfast.elastic import Generation, Identity, WorkerSpec
from holdfast.parallel.comm import (
    Communicator,
    Groups,
    MembershipChange,
    build_groups,
    edit_groups,
)
from holdfast.trainer.config import RunConfig
from holdfast.trainer.elastic.interruption import Interruption
from holdfast.trainer.elastic.transition import Transition
from holdfast.trainer.step import backend_of, mark_compilation


@dataclass(frozen=True, slots=True)
class GenerationGroups:
    """The communicators of one rank in one generation."""

    groups: Groups
    """The communicators of the new plan."""
    members: Communicator
    """All ranks of the generation, for the change itself."""
    beside: Communicator
    """All ranks of the generation, for transfers beside the steps."""


class GroupTransport:
    """Connects this rank with the others of each generation. One thread, but for `abort`."""

    def __init__(
        self,
        config: RunConfig,
        spec: WorkerSpec,
        device: torch.device,
        interruption: Interruption,
        compare_terms: Callable[[Generation, Store], None],
    ) -> None:
        """Nothing is connected yet.

        Args:
            compare_terms: checks that all ranks of a generation train with the same.
        """
        self._compare_terms = compare_terms
        self._config, self._spec, self._device = config, spec, device
        self._interruption = interruption
        self._groups: Groups | None = None
        self._connected: dict[int, Identity] = {}
        """The processes that `_groups` connect."""

    @property
    def is_whole(self) -> bool:
        """Whether the connections are intact and idle."""
        return self._groups is None or self._groups.is_whole

    def connect(self, transition: Transition, store: Store) -> GenerationGroups:
        """Build or edit the groups for the new plan. Collective over all ranks of the generation.

        Raises:
            PeerLost: a rank is gone.
            TermsDiffer: the first ranks of the run do not train with the same.
        """
        generation, rank = transition.generation, self._spec.rank
        if not transition.recovery.active:  # else every rank was compared before it came
            self._compare_terms(generation, store)
        replicas = transition.after.stage_replicas
        world = replicas.ranks if rank in replicas.ranks else generation.ranks
        # Activations may come from any replica of a stage.
        axes = {**transition.after.axis_groups(rank), "pipeline": world}
        members = {member.rank: member.identity for member in generation.members}
        if self._groups is None:
            groups = build_groups(
                store,
                generation.store.rpartition(":")[0],
                rank,
                world,
                axes,
                backend=backend_of(self._config, self._device),
                generation=generation.number,
                record_path=self._spec.flight_record,
                votes_over_gloo=True,
            )
            mark_compilation(self._config, groups.recorder)
        else:
            change = MembershipChange(
                generation.number,
                left=_differing(self._connected, members),
                joined=_differing(members, self._connected),
                kept=transition.recovery.connected,
                store=store,
            )
            groups = edit_groups(self._groups, change, world, axes)
        # The groups come first, then the reason: `abort` is called after the reason is there.
        self._groups, self._connected = groups, members
        if (reason := self._interruption.reason) is not None:
            groups.abort(reason)
        return GenerationGroups(
            groups,
            members=groups.extra("generation", generation.ranks),
            beside=groups.extra("beside", generation.ranks),
        )

    def abort(self, reason: str) -> None:
        """Release all waits in the groups, with `PeerLost`. From any thread; does not block."""
        groups = self._groups
        if groups is not None:
            groups.abort(reason)


def _differing(these: dict[int, Identity], those: dict[int, Identity]) -> frozenset[int]:
    """The ranks whose process differs between two sets."""
    return frozenset(rank for rank, identity in these.items() if those.get(rank) != identity)
