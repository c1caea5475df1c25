"""One rank's state under the next plan: from live holders, or from a checkpoint.

The training of before is left as it is, so that what fails can begin again. Exact-mode safe.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from holdfast.parallel.comm import Communicator, Groups
from holdfast.parallel.optimizer import BackgroundTransfer, carried_bytes, move_blocks
from holdfast.parallel.plan import (
    Plan,
    held_blocks,
    incoming_blocks,
    plan_block_transfers,
    state_of,
)
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig
from holdfast.trainer.elastic.block_states import BlockStates
from holdfast.trainer.elastic.worker_status import RecoveryPlan
from holdfast.trainer.step import StepProgress, Training, included_after_change, keeps_sums


def training_from_holders(
    config: RunConfig,
    rank: int,
    device: torch.device,
    recovery: RecoveryPlan,
    plan: Plan,
    following: Plan,
    before: Training | None,
    groups: Groups,
    everybody: Communicator,
    beside: Communicator,
    node_of: Mapping[int, str],
) -> tuple[Training | None, int]:
    """This rank's training under `following`, complete, from the state that `recovery.holders` have.

    Collective over all ranks of the generation (`everybody`).

    Args:
        plan: that the holders' state is laid out by.
        before: this rank's training under it; None without state.
        beside: carries what is incoming under `following` beside its steps.
    Returns:
        The training, None for a rank that has no part in `following`; and the bytes that all ranks received.
    Raises:
        PeerLost: a rank is gone, or state arrived damaged.
    """
    held = state_of(plan, recovery.holders, filled=recovery.filled)
    needed = held_blocks(following, following.stage_replicas.ranks)
    coming = incoming_blocks(following, following.stage_replicas.ranks)
    training = None
    if rank in following.stage_replicas.ranks:
        training = Training(config, rank, device, following, groups, before=before, initial=False)
    source, target = BlockStates(before), BlockStates(training)
    wanted = needed.get(rank, set()) | coming.get(rank, set())
    for key in wanted & held.get(rank, set()):
        target.write(key, source.read(key))
    block_transfers = plan_block_transfers(plan, held, needed, node_of)
    dtype = PRECISIONS[config.train.precision].state.dtype
    move_blocks(block_transfers, rank, everybody, source.read, target.write, dtype=dtype)
    moved = carried_bytes(block_transfers, dtype)
    if training is None:
        return None, moved
    if following.incoming:
        lacking = {r: keys - held.get(r, set()) for r, keys in coming.items()}
        training.background_transfer = BackgroundTransfer(
            plan_block_transfers(following, needed, lacking, node_of),
            rank,
            beside,
            target.read,
            target.write,
            dtype=dtype,
            recorder=groups.recorder,
        )
    training.optimizer.restore(recovery.updates)
    training.shadows.restore(recovery.updates)
    if _must_gather(recovery, plan, following):
        training.optimizer.round_masters()
        training.optimizer.gather()
    training.progress = StepProgress(
        recovery.steps, recovery.outcome, recovery.steps, filled=not following.incoming
    )
    included = included_after_change(plan, following, recovery.counted, recovery.fresh)
    if included:
        kept = rank in recovery.counted and keeps_sums(plan, following, rank, recovery.fresh)
        training.resume_step(recovery.steps, included, before if kept else None)
    return training, moved


def fill_shadows(training: Training, everybody: Communicator, node_of: Mapping[int, str]) -> int:
    """Copy every owner's state to its shadows, once it has been loaded. Collective.

    Returns:
        The bytes that all ranks received.
    """
    plan = training.plan
    ranks = plan.stage_replicas.ranks
    held = {rank: set(plan.owned_places(rank)) for rank in ranks}
    training.shadows.restore(training.optimizer.step)
    states = BlockStates(training)
    block_transfers = plan_block_transfers(plan, held, held_blocks(plan, ranks), node_of)
    dtype = PRECISIONS[training.config.train.precision].state.dtype
    move_blocks(block_transfers, training.rank, everybody, states.read, states.write, dtype=dtype)
    return carried_bytes(block_transfers, dtype)


def _must_gather(recovery: RecoveryPlan, plan: Plan, following: Plan) -> bool:
    """Whether some rank lacks parameters that it is to have. Pure; equal on every rank."""
    if not recovery.complete:
        return True
    return any(
        rank not in recovery.holders
        or plan.stage_replicas.stage_replica(rank) != following.stage_replicas.stage_replica(rank)
        or _layers(plan, rank) != _layers(following, rank)
        for rank in following.stage_replicas.ranks
        if following.stage_replicas.find(rank) is not None
    )


def _layers(plan: Plan, rank: int) -> list[range]:
    return [plan.layers_of(chunk) for chunk in plan.chunks_of(rank)]
