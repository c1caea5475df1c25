"""An axis inside the stage replica is one entry of the table; plans and groups follow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.distributed import Store

from holdfast.parallel.comm import build_groups, edit_groups
from holdfast.parallel.comm.protocol import MembershipChange
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import AXES, Axis, Mesh
from holdfast.parallel.plan import Plan, held_blocks, make_plan, replan, training_program
from holdfast.parallel.plan.replan import Roster, with_shadows
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.rules import problems_of
from support.oracles.plan_layouts import optimizer_layout
from support.processes.cluster import Cluster
from support.runs.plans import MICRO_BATCHES, NODES, check, first_plan
from support.runs.small_runs import make_config

DUMMY = Axis("dummy", "nothing: its ranks hold copies", in_stage_replica=True)
PARTS = Axis("dummy", "a second split", in_stage_replica=True, splits_parameters=True)


def table(axis: Axis) -> tuple[Axis, ...]:
    return (AXES[0], axis, *AXES[1:])


def plan_with(axis: Axis, size: int, *, tensor: int = 2, data: int = 2, pipeline: int = 2) -> Plan:
    mesh = Mesh.of(table(axis), tensor=tensor, data=data, pipeline=pipeline, dummy=size)
    parts = tensor * (size if axis.splits_parameters else 1)
    layers = first_plan(tensor=parts).layers
    plan = make_plan(
        layers,
        mesh,
        virtual=1,
        schedule="1f1b",
        micro_batches=MICRO_BATCHES,
        block_elements=2000,
    )
    return with_shadows(plan, Roster(plan.stage_replicas.ranks, NODES), 1)


def test_names_and_order_of_the_table() -> None:
    names = [axis.name for axis in AXES]
    assert len(set(names)) == len(names)
    assert names[-2:] == ["data", "pipeline"]
    assert [axis.in_stage_replica for axis in AXES] == [True] * (len(AXES) - 2) + [False] * 2
    with pytest.raises(ConfigError, match="depth is not an axis of the mesh"):
        Mesh.of(depth=2)


def test_every_axis_is_a_key_and_one_that_is_not_available_is_refused() -> None:
    for axis in AXES:
        config: RunConfig = make_config(parallel={axis.name: 2})
        refused = f"parallel.{axis.name} = 2: not available in this version; set it to 1"
        assert (refused in problems_of(config)) is not axis.is_available


@pytest.mark.parametrize("axis", [DUMMY, PARTS], ids=["copies", "parts"])
def test_a_new_axis_of_one_rank_changes_nothing(axis: Axis) -> None:
    without = first_plan(tensor=2)
    plan = plan_with(axis, 1)
    assert plan.stage_replicas == without.stage_replicas
    assert plan.owners == without.owners
    assert plan.shadows == without.shadows
    for rank in plan.stage_replicas.ranks:
        assert training_program(plan, rank) == training_program(without, rank)


@pytest.mark.parametrize("axis", [DUMMY, PARTS], ids=["copies", "parts"])
def test_a_new_axis_of_two_ranks_is_planned_and_survives_losses(axis: Axis) -> None:
    plan = plan_with(axis, 2)
    mesh = plan.configured_mesh
    assert mesh.size == plan.stage_replicas.size == 16
    assert plan.stage_replicas.shards == mesh.shards == len(plan.blocks) == 4
    assert [mesh.rank(*mesh.coordinates(rank)) for rank in range(16)] == list(range(16))
    check(plan, set(range(16)))
    following = replan(plan, Roster(tuple(range(1, 16)), NODES), generation=1, redundancy=1)
    check(following, set(range(1, 16)))
    assert set(following.stage_replicas.spares) == {1, 2, 3}
    held = held_blocks(following, following.stage_replicas.ranks)
    assert set().union(*held.values()) == {
        (index, place) for index in range(4) for place in range(len(plan.blocks[index]))
    }


def test_ranks_of_a_copying_axis_hold_the_same_parts_and_of_a_splitting_one_others() -> None:
    copies, parts = plan_with(DUMMY, 2), plan_with(PARTS, 2)
    for layer in copies.layers:
        for shard, specs in enumerate(layer.parameters):
            other = layer.parameters[(shard + 2) % 4]
            assert [s.box for s in specs] == [s.box for s in other]
            for spec in specs:
                assert {shard, (shard + 2) % 4} <= set(spec.copies)
                assert [s for s in range(4) if spec.counts_in_norm(s)] == [spec.copies[0]]
    counted = Counter(
        spec.name
        for layer in copies.layers
        for shard, specs in enumerate(layer.parameters)
        for spec in specs
        if spec.counts_in_norm(shard) and spec.name.endswith("q_proj.weight")
    )
    assert set(counted.values()) == {2}  # one for each tensor rank, whatever the copies
    assert parts.layers == first_plan(tensor=4).layers
    assert set(optimizer_layout(parts).holdings) == set(range(16))


def test_groups_along_a_new_axis_are_found_and_edited() -> None:
    plan = plan_with(DUMMY, 2)
    assert plan.axis_groups(5) == {"tensor": (4, 5), "dummy": (5, 7), "shards": (4, 5, 6, 7)}
    for rank in range(16):
        along = plan.axis_groups(rank)
        assert set(along["tensor"]) & set(along["dummy"]) == {rank}
    assert first_plan(tensor=2).axis_groups(5) == {"tensor": (4, 5)}
    following = replan(plan, Roster(tuple(range(1, 16)), NODES), generation=1)
    assert following.axis_groups(1) == {"tensor": (1,), "dummy": (1,), "shards": (1,)}


def sums_along(rank: int, world_size: int, store: Store) -> dict[str, Any]:
    """The sum of 2^rank along each axis, before and after an edit that changes no member."""
    plan = plan_with(DUMMY, 2, data=1, pipeline=1)
    axes = {**plan.axis_groups(rank), "pipeline": (rank,)}
    world = range(world_size)
    groups = build_groups(store, "127.0.0.1", rank, world, axes, backend="gloo", generation=0)

    def sums() -> dict[str, float]:
        found = {}
        for axis, group in groups.axes.items():
            group.all_reduce(value := torch.tensor([float(2**rank)])).wait()
            found[axis] = value.item()
        return found

    before = sums()
    assert groups.shards.ranks == (0, 1, 2, 3)
    assert groups.shards.index == plan.stage_replicas.shard_index(rank)
    edited = edit_groups(groups, MembershipChange(1), world, axes)
    assert edited["dummy"] is groups["dummy"]
    groups = edited
    assert sums() == before
    return before


@pytest.mark.mp
def test_a_new_axis_has_a_communicator(cluster: Cluster) -> None:
    results = cluster.run("test_axes:sums_along", 4, timeout_s=60.0)
    assert [found["tensor"] for found in results] == [3.0, 3.0, 12.0, 12.0]
    assert [found["dummy"] for found in results] == [5.0, 10.0, 5.0, 10.0]
    assert [found["pipeline"] for found in results] == [1.0, 2.0, 4.0, 8.0]
