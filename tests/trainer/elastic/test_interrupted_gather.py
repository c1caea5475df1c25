"""Changes of ranks that fail, or begin, while parameters are gathered, and what follows them."""

from __future__ import annotations

import threading
from typing import Any, cast

import msgspec
import pytest
from torch.distributed import PrefixStore, Store

from holdfast.elastic import Generation, Identity
from holdfast.elastic.generation import Member
from holdfast.parallel.comm import Groups, MembershipChange, edit_groups
from holdfast.parallel.errors import PeerLost
from holdfast.parallel.plan import Roster, with_shadows
from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.elastic.corruption import compare_copies
from holdfast.trainer.elastic.state_recovery import TrainingBuilder, fill_shadows
from holdfast.trainer.elastic.transition import BETWEEN_STEPS, Transition, plan_transition
from holdfast.trainer.elastic.transport import GenerationGroups
from holdfast.trainer.elastic.worker_status import WorkerStatus, plan_recovery, status_to_data
from holdfast.trainer.step import Training, open_training
from holdfast.trainer.worlds.world import local_world
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config


def do_step(training: Training, step: int) -> None:
    training.compute(step)
    training.vote(*training.reduce())
    training.apply(training.config.rate_of(step))


def next_groups(training: Training, groups: Groups, number: int, store: Store) -> Groups:
    """This rank's communicators in the generation `number`, which has the same ranks."""
    plan = training.plan
    world = plan.stage_replicas.ranks
    change = MembershipChange(number, store=PrefixStore(str(number), store))
    return edit_groups(
        groups, change, world, {**plan.axis_groups(training.rank), "pipeline": world}
    )


def transition_of(training: Training, config: RunConfig, number: int) -> Transition:
    """The change to a generation of the same ranks, all of which report what this one does."""
    progress = training.progress
    status = WorkerStatus(
        active=1,
        decided=progress.decided,
        updated=progress.updated,
        updates=training.optimizer.step,
        complete=training.has_all_parameters,
        outcome=progress.outcome,
        connected=False,
    )
    ranks = training.plan.stage_replicas.ranks
    members = [
        Member(
            Identity(rank),
            node=f"node-{rank}",
            store="",
            held=1,
            step=progress.decided,
            phase=BETWEEN_STEPS,
            leaving=False,
            data=status_to_data(status),
        )
        for rank in ranks
    ]
    generation = Generation(number, tuple(members))
    recovery = plan_recovery(generation)
    return plan_transition(
        generation, recovery, training.plan, redundancy=config.elastic.redundancy
    )


def change_ranks(
    rank: int, world_size: int, store: Store, *, config: dict[str, Any], gathers: bool
) -> str:
    """Two steps with a change between them. Returns the digest of the parameters.

    Args:
        gathers: whether an attempt at the change begins to gather on rank 0, and then fails.
    """
    converted = convert_config(config)
    training = open_training(converted, local_world(rank, world_size), store)
    do_step(training, 0)
    training.finish_gather()
    groups = next_groups(training, training.groups, 2, store)
    if gathers and rank == 0:
        attempt = Training(
            converted, rank, training.device, training.plan, groups, before=training, initial=False
        )
        lost = threading.Timer(0.2, groups.abort, ["rank 2: killed by SIGKILL"])
        lost.start()
        with pytest.raises(PeerLost):
            attempt.optimizer.gather()  # the other rank never comes
        lost.join()
    groups.abort("rank 2: killed by SIGKILL")
    training.close()
    groups = next_groups(training, groups, 3, store)
    following = rebuilt(training, groups, store)
    do_step(following, 1)
    return following.parameter_digest()


def rebuilt(training: Training, groups: Groups, store: Store) -> Training:
    """The training of the generation of `groups`, which has the same ranks."""
    world = training.plan.stage_replicas.ranks
    connection = GenerationGroups(
        groups, groups.extra("members", world), groups.extra("beside", world)
    )
    config, nothing = training.config, cast(Any, None)
    builder = TrainingBuilder(config, training.rank, training.device, nothing, nothing)
    transition = transition_of(training, config, groups.generation)
    built = builder.build(transition, training, connection, store, sound_until=None)
    assert built.training is not None
    return built.training


@pytest.mark.mp
def test_parameters_of_a_change_that_failed_are_not_awaited_after_the_next(
    cluster: Cluster,
) -> None:
    config = make_config(
        parallel={"data": 2},
        model={"layers": 2},
        elastic={"enabled": True, "redundancy": 0},
    )
    plain, interrupted = (
        cluster.run(
            "test_interrupted_gather:change_ranks",
            2,
            config=msgspec.to_builtins(config),
            gathers=gathers,
        )
        for gathers in (False, True)
    )
    assert interrupted == plain
    assert len(set(plain)) == 1


def with_copies(training: Training) -> Training:
    """The same training by a plan in which another rank has a copy of each block."""
    ranks = training.plan.stage_replicas.ranks
    nodes = {rank: f"node-{rank}" for rank in ranks}
    plan = with_shadows(training.plan, Roster(ranks, nodes, frozenset()), 1)
    groups = training.groups
    copied = Training(training.config, training.rank, training.device, plan, groups)
    fill_shadows(copied, groups.control, nodes)
    return copied


def lose_a_rank_while_updating(
    rank: int, world_size: int, store: Store, *, config: dict[str, Any], lost: str
) -> tuple[str, int]:
    """Three steps; in the second a rank is lost while the others update their blocks.

    Args:
        lost: when that is noticed: "sends", after the first bucket has left; "receives", when all
            have; "": no rank is lost.
    Returns:
        The digest of the parameters, and how many blocks have copies that differ after the change.
    """
    training = with_copies(
        open_training(convert_config(config), local_world(rank, world_size), store)
    )
    do_step(training, 0)
    training.compute(1)
    training.vote(*training.reduce())
    groups, reason = training.groups, "rank 3: killed by SIGKILL"
    last = len(training.optimizer.owned)
    assert last > 1

    def fence(number: int) -> int:
        if lost == "receives" and number == last:
            groups.abort(reason)
        return number

    def at(step: int, phase: str) -> None:
        if lost == "sends" and phase == "gather":
            groups.abort(reason)

    training.protect(fence)
    training.apply(training.config.rate_of(1), at)
    training.protect(None)
    assert training.progress.updated == 2
    if lost:
        assert groups.signal.reason == reason
        assert not training.has_all_parameters
        with pytest.raises(PeerLost):
            training.compute(2)
        training.close()
    else:
        training.finish_gather()
    following = rebuilt(training, next_groups(training, groups, 2, store), store)
    found = compare_copies(following, following.groups.control).corrupt
    do_step(following, 2)
    return following.parameter_digest(), len(found)


@pytest.mark.mp
def test_an_update_that_a_loss_interrupts_is_done_once(cluster: Cluster) -> None:
    config = make_config(
        train={"precision": "bf16", "global_batch": 4},
        parallel={"data": 3, "bucket_elements": 512},
        model={"layers": 2},
        elastic={"enabled": True, "redundancy": 1},
    )
    plain, *interrupted = (
        cluster.run(
            "test_interrupted_gather:lose_a_rank_while_updating",
            3,
            config=msgspec.to_builtins(config),
            lost=when,
        )
        for when in ("", "sends", "receives")
    )
    assert interrupted == [plain, plain]
    assert len(set(plain)) == 1
    assert not plain[0][1]
