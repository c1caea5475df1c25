"""The state of one rank under the next plan: from live holders, or from a checkpoint.

The active training stays unchanged, so that a failed attempt can begin again. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch.distributed import Store

from holdfast.elastic import Generation
from holdfast.parallel.comm import Communicator
from holdfast.parallel.optimizer import BackgroundTransfer, TransferPace, carried_bytes, move_blocks
from holdfast.parallel.plan import (
    BlockKey,
    Plan,
    all_keepers,
    held_blocks,
    incoming_blocks,
    plan_block_transfers,
    shards,
    state_of,
)
from holdfast.trainer.config import RunConfig
from holdfast.trainer.elastic.block_states import BlockStates
from holdfast.trainer.elastic.recovery import Built
from holdfast.trainer.elastic.transition import Transition
from holdfast.trainer.elastic.transport import GenerationGroups
from holdfast.trainer.elastic.worker_status import RecoveryPlan
from holdfast.trainer.step import (
    StepProgress,
    Training,
    hosted_experts,
    included_after_change,
    inputs_after_change,
    keeps_sums,
    state_format,
)


class CheckpointLoader(Protocol):
    """The loader of the newest checkpoint; `holdfast.trainer.elastic.saves.ElasticSaves`."""

    def load(
        self, training: Training, store: Store, generation: Generation, *, sound_until: int | None
    ) -> int: ...


class TrainingBuilder:
    """Builds one rank's training for each new generation."""

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        device: torch.device,
        loader: CheckpointLoader,
        pace_of: Callable[[Training], TransferPace],
    ) -> None:
        """No training is built yet.

        Args:
            pace_of: returns the pace of background transfers in a training.
        """
        self._config, self._rank, self._device = config, rank, device
        self._loader, self._pace_of = loader, pace_of

    def build(
        self,
        transition: Transition,
        active: Training | None,
        connection: GenerationGroups,
        store: Store,
        *,
        sound_until: int | None,
    ) -> Built:
        """This rank's training under `transition.after`, complete.

        Collective over all ranks of the generation.

        Args:
            active: this rank's training under `transition.before`; None without state.
            sound_until: if live state is corrupt, the last step that a loaded checkpoint may have.
        Raises:
            PeerLost: a rank is gone, or state arrived damaged.
        """
        groups = connection.groups
        building = groups.recorder.busy("build", self._config.elastic.startup_grace_s)
        if transition.keeps_state:
            with building:
                return self._from_holders(transition, active, connection)
        if self._rank not in transition.after.stage_replicas.ranks:
            return Built(None, None, 0)
        with building:
            training = Training(self._config, self._rank, self._device, transition.after, groups)
        step = self._loader.load(training, store, transition.generation, sound_until=sound_until)
        training.progress = replace(training.progress, decided=step, updated=step)
        moved = fill_shadows(training, groups.control, transition.failure_domains)
        return Built(training, step, moved)

    def _from_holders(
        self, transition: Transition, active: Training | None, connection: GenerationGroups
    ) -> Built:
        """Build from live ranks: state needed at once moves now, the rest beside the steps."""
        before, after, recovery = transition.before, transition.after, transition.recovery
        rank, ranks = self._rank, after.stage_replicas.ranks
        training = None
        if rank in ranks:
            training = Training(
                self._config,
                rank,
                self._device,
                after,
                connection.groups,
                before=active,
                initial=False,
            )
        held = state_of(before, recovery.holders, filled=recovery.filled)
        needed, incoming = held_blocks(after, ranks), incoming_blocks(after, ranks)
        source, target = BlockStates(active), BlockStates(training)
        wanted = needed.get(rank, set()) | incoming.get(rank, set())
        for key in wanted & held.get(rank, set()):
            target.write(key, source.read(key))
        transfers = plan_block_transfers(before, held, needed, transition.failure_domains)
        form = state_format(self._config)
        move_blocks(transfers, rank, connection.members, source.read, target.write, form=form)
        moved = carried_bytes(transfers, form)
        if training is None:
            return Built(None, None, moved)
        if after.incoming:
            lacking = {r: keys - held.get(r, set()) for r, keys in incoming.items()}
            training.background_transfer = BackgroundTransfer(
                plan_block_transfers(after, needed, lacking, transition.failure_domains),
                rank,
                connection.beside,
                target.read,
                target.write,
                form=form,
                recorder=connection.groups.recorder,
                pace=self._pace_of(training),
            )
        _take_step(training, transition, active)
        return Built(training, None, moved)


def _take_step(training: Training, transition: Transition, active: Training | None) -> None:
    """Set a training, whose blocks are there, to the step of all holders. Collective."""
    before, after, recovery = transition.before, transition.after, transition.recovery
    training.optimizer.restore(recovery.updates)
    training.shadows.restore(recovery.updates)
    if _must_gather(recovery, before, after):
        training.optimizer.round_masters()
        training.optimizer.gather(_having(recovery, before, after))
    else:
        # All ranks have all parameters, though an attempt that failed may have begun to gather.
        training.model.arrival.cancel()
    training.progress = StepProgress(
        recovery.steps,
        recovery.outcome,
        recovery.steps,
        filled=not after.incoming,
        recent=transition.recent,
        rewinds=recovery.rewinds,
    )
    training.remove(recovery.removals)
    included = included_after_change(before, after, recovery.included, recovery.fresh)
    if included:
        rank = training.rank
        kept = rank in recovery.included and keeps_sums(before, after, rank, recovery.fresh)
        inputs = inputs_after_change(before, after, recovery.inputs, recovery.fresh)
        training.resume_step(recovery.steps, included, active if kept else None, inputs)


def fill_shadows(training: Training, members: Communicator, node_of: Mapping[int, str]) -> int:
    """Copy every owner's state to its shadows after a load. Collective.

    Returns:
        The bytes that all ranks received.
    """
    plan = training.plan
    ranks = plan.stage_replicas.ranks
    held = {rank: set(plan.owned_blocks(rank)) for rank in ranks}
    training.shadows.restore(training.optimizer.step)
    states = BlockStates(training)
    block_transfers = plan_block_transfers(plan, held, held_blocks(plan, ranks), node_of)
    form = training.optimizer.form
    move_blocks(block_transfers, training.rank, members, states.read, states.write, form=form)
    return carried_bytes(block_transfers, form)


def _must_gather(recovery: RecoveryPlan, plan: Plan, following: Plan) -> bool:
    """Whether some rank lacks parameters of the next plan. Pure; equal on every rank."""
    if not recovery.complete:
        return True
    return any(
        rank not in recovery.holders
        or plan.stage_replicas.stage_replica(rank) != following.stage_replicas.stage_replica(rank)
        or _layers(plan, rank) != _layers(following, rank)
        or hosted_experts(plan, rank) != hosted_experts(following, rank)
        for rank in following.stage_replicas.ranks
        if following.stage_replicas.find(rank) is not None
    )


def _having(recovery: RecoveryPlan, plan: Plan, following: Plan) -> Callable[[BlockKey, int], bool]:
    """Whether a rank has a block's parameters under the next plan, as it had them before. Pure."""
    if not recovery.complete or shards(plan, "parameters"):
        return lambda key, holder: False
    staying = {rank for rank in recovery.holders if _layers(plan, rank) == _layers(following, rank)}
    return lambda key, holder: (
        holder in staying and holder in all_keepers(plan, plan.block(key), "parameters")
    )


def _layers(plan: Plan, rank: int) -> list[range]:
    return [plan.layers_of(chunk) for chunk in plan.chunks_of(rank)]
