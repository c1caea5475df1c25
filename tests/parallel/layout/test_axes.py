"""An axis inside the stage replica is one entry of the table; plans, estimates and groups follow.

tests/trainer/test_context.py trains with one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import Store

from holdfast.parallel.comm import build_groups, edit_groups
from holdfast.parallel.comm.protocol import MembershipChange
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import AXES, Axis, Mesh
from holdfast.parallel.plan import Plan, held_blocks, make_plan, replan, training_program
from holdfast.parallel.plan.cost import action_cost, peak_activation_bytes, rank_memory
from holdfast.parallel.plan.replan import Roster, with_shadows
from holdfast.parallel.precision import PRECISIONS
from holdfast.parallel.schedules import Action, Op
from holdfast.trainer.config import RunConfig
from support.oracles.plan_layouts import optimizer_layout
from support.processes.cluster import Cluster
from support.runs.plans import MICRO_BATCHES, NODES, check, first_plan
from support.runs.small_runs import make_config

TOKENS = Axis("dummy", "the tokens, say: its ranks hold copies", True)
PARTS = Axis("dummy", "a second split", True, splits_parameters=True)
KINDS = pytest.mark.parametrize("axis", [TOKENS, PARTS], ids=["tokens", "parts"], indirect=True)


@pytest.fixture
def axis(request: pytest.FixtureRequest) -> Iterator[Axis]:
    """An axis that is in the table while the test runs."""
    first_plan.cache_clear()  # a plan's mesh has all axes of the table
    with mock.patch.dict(AXES, dummy=request.param):  # pyrefly: ignore
        yield request.param
    first_plan.cache_clear()


def plan_with(size: int, *, tensor: int = 2, data: int = 2, pipeline: int = 2) -> Plan:
    """A plan with the dummy axis."""
    mesh = Mesh.of(tensor=tensor, data=data, pipeline=pipeline, dummy=size)
    plan = make_plan(
        first_plan(tensor=mesh.parts).layers,
        mesh,
        virtual=1,
        schedule="1f1b",
        micro_batches=MICRO_BATCHES,
        block_elements=2000,
    )
    return with_shadows(plan, Roster(plan.stage_replicas.ranks, NODES), 1)


def test_names_and_order_of_the_table() -> None:
    assert [axis.name for axis in AXES.values()] == list(AXES)
    inside = [axis.in_stage_replica for axis in AXES.values()]
    assert inside == [True] * (len(AXES) - 2) + [False] * 2
    assert list(AXES)[-2:] == ["data", "pipeline"]
    with pytest.raises(ConfigError, match="depth is not an axis of the mesh"):
        Mesh.of(depth=2)


def test_every_axis_is_a_key() -> None:
    for axis in AXES.values():
        config: RunConfig = make_config(parallel={axis.name: 2})
        assert config.mesh[axis.name] == 2


@KINDS
def test_a_new_axis_of_one_rank_changes_nothing(axis: Axis) -> None:
    without = first_plan(tensor=2)
    plan = plan_with(1)
    assert plan.stage_replicas == without.stage_replicas
    assert plan.layers == without.layers
    assert plan.owners == without.owners
    assert plan.shadows == without.shadows
    for rank in plan.stage_replicas.ranks:
        assert training_program(plan, rank) == training_program(without, rank)


@KINDS
def test_a_new_axis_of_two_ranks_is_planned_and_survives_losses(axis: Axis) -> None:
    plan = plan_with(2)
    mesh = plan.configured_mesh
    assert mesh.size == plan.stage_replicas.size == 16
    assert {*plan.stage_replicas.sizes(0)} == {mesh.shards} == {4}
    assert len(plan.blocks) == mesh.parts == (4 if axis.splits_parameters else 2)
    assert [mesh.rank(*mesh.coordinates(rank)) for rank in range(16)] == list(range(16))
    check(plan, set(range(16)))
    following = replan(plan, Roster(tuple(range(1, 16)), NODES), generation=1, redundancy=1)
    check(following, set(range(1, 16)))
    assert set(following.stage_replicas.spares) == {1, 2, 3}
    held = held_blocks(following, following.stage_replicas.ranks)
    assert set().union(*held.values()) == {block.key for blocks in plan.blocks for block in blocks}


@KINDS
def test_texts_name_the_axis(axis: Axis) -> None:
    plan = plan_with(2)
    assert plan.configured_mesh.text == "tensor 2 x dummy 2 x pipeline 2 x data 2"
    assert plan.configured_mesh.shard_text(1) == "tensor 1, dummy 0"
    needed = r"3 ranks are left, but a stage replica takes 4 \(tensor 2 x dummy 2\)"
    with pytest.raises(ConfigError, match=needed):
        replan(plan, Roster((0, 1, 2), NODES), generation=1)


@pytest.mark.parametrize("axis", [TOKENS], indirect=True)
def test_layers_of_another_number_of_parts_are_refused(axis: Axis) -> None:
    layers, mesh = first_plan(tensor=4).layers, Mesh.of(tensor=2, dummy=2)
    found = "split into 4 parts, but a stage replica of tensor 2 x dummy 2 holds 2"
    with pytest.raises(ConfigError, match=found):
        make_plan(layers, mesh, virtual=1, schedule="1f1b", micro_batches=2, block_elements=2000)


@pytest.mark.parametrize("axis", [TOKENS], indirect=True)
def test_ranks_along_an_axis_that_splits_no_parameters_hold_the_same_blocks(axis: Axis) -> None:
    plan = plan_with(2)
    assert plan.configured_mesh.shards_of_part == ((0, 2), (1, 3))
    assert [plan.parts_of(rank) for rank in range(8)] == [(0,), (1,)] * 4
    assert plan.blocks == first_plan(tensor=2).blocks
    for block in (block for blocks in plan.blocks for block in blocks):
        stage, part = plan.stage_of_layer(block.layer), block.part
        if len(plan.spec_of(block).copies) == 1:
            assert plan.holders(block) == plan.ranks_of((part,), stage)
            assert len(plan.holders(block)) == 4  # two replicas, two ranks along the axis
    owners = {owner for of_part in plan.owners for owner in of_part}
    assert owners == set(range(16)), "all of them share the optimizer's state"


@pytest.mark.parametrize("axis", [PARTS], indirect=True)
def test_ranks_along_an_axis_that_splits_parameters_hold_parts(axis: Axis) -> None:
    plan = plan_with(2)
    assert plan.layers == first_plan(tensor=4).layers
    assert plan.configured_mesh.shards_of_part == ((0,), (1,), (2,), (3,))
    assert set(optimizer_layout(plan).holdings) == set(range(16))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("axis", [TOKENS], indirect=True)
def test_gradients_are_added_of_the_ranks_that_see_parts(
    axis: Axis, sequence_parallel: bool
) -> None:
    """Of a norm, every tensor rank sees its part of the tokens, or all of them alike."""
    plan = make_plan(
        first_plan(tensor=2, sequence_parallel=sequence_parallel).layers,
        Mesh.of(tensor=2, dummy=2),
        virtual=1,
        schedule="1f1b",
        micro_batches=2,
        block_elements=2000,
    )
    seen = {
        (name, plan.contributors(block), plan.holders(block))
        for blocks in plan.blocks
        for block in blocks
        for name in [plan.spec_of(block).name]
        if name.endswith(("layers.0.input_layernorm.weight", "layers.0.self_attn.q_proj.weight"))
    }
    norm, query = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"
    assert seen == {
        (norm, (0, 1, 2, 3) if sequence_parallel else (0, 2), (0, 1, 2, 3)),
        (query, (0, 2), (0, 2)),
        (query, (1, 3), (1, 3)),
    }


@KINDS
def test_estimates_divide_what_the_axis_divides(axis: Axis) -> None:
    plan, without = plan_with(2), first_plan(tensor=2)

    def seconds(of: Plan) -> float:
        return action_cost(of)(Action(Op.FORWARD, 0, 0))

    def memory(of: Plan) -> tuple[int, int]:
        found = rank_memory(of, 0, precision=PRECISIONS["fp32"], owned_bytes=12, exact=True)
        return found.parameters, found.optimizer

    assert seconds(plan) == seconds(without) / 2
    if axis.splits_parameters:
        return  # what its ranks keep is in the layers, which were made for four parts
    kept = peak_activation_bytes(without, 0)
    assert peak_activation_bytes(plan, 0) == kept // 2
    sent = [layer.output_bytes for layer in without.layers]
    assert [layer.output_bytes for layer in plan.layers] == [size // 2 for size in sent]
    assert memory(plan)[0] == memory(without)[0]
    assert memory(plan)[1] < 0.7 * memory(without)[1], "its ranks share the optimizer's state"


@pytest.mark.parametrize("axis", [TOKENS], indirect=True)
def test_groups_along_a_new_axis_are_found_and_edited(axis: Axis) -> None:
    plan = plan_with(2)
    assert plan.axis_groups(5) == {"tensor": (4, 5), "dummy": (5, 7), "shards": (4, 5, 6, 7)}
    for rank in range(16):
        along = plan.axis_groups(rank)
        assert set(along["tensor"]) & set(along["dummy"]) == {rank}
    following = replan(plan, Roster(tuple(range(1, 16)), NODES), generation=1)
    assert following.axis_groups(1) == {"tensor": (1,), "dummy": (1,), "shards": (1,)}


def test_groups_without_a_new_axis_are_those_of_the_tensor_axis_alone() -> None:
    assert first_plan(tensor=2).axis_groups(5) == {"tensor": (4, 5)}


def sums_along(rank: int, world_size: int, store: Store) -> dict[str, Any]:
    """The sum of 2^rank along each axis, before and after an edit that changes no member."""
    with mock.patch.dict(AXES, dummy=TOKENS):  # pyrefly: ignore
        plan = plan_with(2, data=1, pipeline=1)
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
