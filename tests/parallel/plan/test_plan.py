"""Plans: pure, complete, balanced, and as large as a cluster."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, strategies as st

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout.boxes import TensorSpec, covers, transfers
from holdfast.parallel.layout.mesh import Mesh
from holdfast.parallel.layout.parameters import LayerSpec
from holdfast.parallel.plan.initial import make_plan
from holdfast.parallel.plan.ownership import assign_owners, blocks, spread_owners
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.plan.sharding import (
    KEPT_KINDS,
    all_keepers,
    keepers,
    keeping,
    keeps_parameters,
)
from holdfast.parallel.schedules import check_programs
from holdfast.trainer.models import layer_specs
from holdfast.trainer.models.llama.family import LlamaConfig
from support.oracles.plan_layouts import optimizer_layout, parameter_layout


def layers_of(
    blocks_of_model: int = 4, tensor: int = 1, *, tied: bool = False, hidden: int = 32
) -> tuple[LayerSpec, ...]:
    model = LlamaConfig(
        family="llama",
        layers=blocks_of_model,
        hidden=hidden,
        intermediate=48,
        heads=8,
        kv_heads=2,
        vocab=67,
        tie_embeddings=tied,
    )
    return layer_specs(
        model,
        tensor=tensor,
        sequence_parallel=tensor > 1,
        seq_len=16,
        micro_batch=1,
        precision="fp32",
        recompute="none",
    )


def plan_of(mesh: Mesh, layers: tuple[LayerSpec, ...] | None = None, **changes: object) -> Plan:
    arguments = {
        "virtual": 1,
        "schedule": "1f1b",
        "micro_batches": 12,
        "block_elements": 256,
        **changes,
    }
    return make_plan(layers or layers_of(tensor=mesh.tensor), mesh, **arguments)  # pyrefly: ignore


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_ranks_and_coordinates_are_inverse(tensor: int, data: int, pipeline: int) -> None:
    mesh = Mesh.of(tensor=tensor, data=data, pipeline=pipeline)
    places = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert [mesh.rank(*place) for place in places] == list(range(mesh.size))
    for rank in range(mesh.size):
        assert rank in mesh.pipeline_group(rank)


LAYOUTS = [
    (Mesh.of(tensor=1, data=1, pipeline=1), {}),
    (Mesh.of(tensor=2, data=3, pipeline=2), {"schedule": "zb-h1"}),
    (Mesh.of(tensor=1, data=2, pipeline=2), {"schedule": "interleaved-1f1b", "virtual": 2}),
    (Mesh.of(tensor=4, data=2, pipeline=2), {"schedule": "zb-v", "virtual": 2}),
    (Mesh.of(tensor=1, data=5, pipeline=4), {"schedule": "gpipe", "micro_batch_order": "shuffled"}),
]


@pytest.mark.parametrize(("mesh", "changes"), LAYOUTS, ids=str)
def test_programs_of_all_ranks_fit_together(mesh: Mesh, changes: dict) -> None:
    plan = plan_of(mesh, **changes)
    for tensor in range(mesh.tensor):
        for replica in range(mesh.data):
            ranks = [mesh.rank(tensor, replica, stage) for stage in range(mesh.pipeline)]
            programs = {rank: training_program(plan, rank) for rank in ranks}
            check_programs(programs, len(plan.placement), plan.micro_batches[replica])
    shared = sorted(number for numbers in plan.micro_batches for number in numbers)
    assert shared == list(range(12))
    counts = [len(numbers) for numbers in plan.micro_batches]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("mesh", "changes"), LAYOUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_every_element_has_an_owner_and_a_holder(mesh: Mesh, changes: dict, tied: bool) -> None:
    layers = layers_of(tensor=mesh.tensor, tied=tied)
    plan = plan_of(mesh, layers, **changes)
    shapes = {s.name: s.shape for layer in layers for s in layer.parameters[0]}
    specs = [TensorSpec(name, shape, "float32") for name, shape in shapes.items()]
    covers(specs, parameter_layout(plan))
    covers(specs, optimizer_layout(plan))
    held = parameter_layout(plan).holdings
    shared = plan.evolved(shard="parameters", shard_group=2)
    for index, found in enumerate(plan.blocks):
        for block, owner in zip(found, plan.owners[index], strict=True):
            keeping_it = all_keepers(plan, block, "parameters")
            assert owner in keeping_it
            spec = layers[block.layer].parameters[index][block.spec_index]
            assert spec.copies[0] == index
            assert keeping_it == tuple(
                rank for rank in range(mesh.size) if spec.box in held[rank].get(spec.name, ())
            )
            for kept in (plan, shared):
                keep = [keeps_parameters(kept, block, rank) for rank in range(mesh.size)]
                found = all_keepers(kept, block, "parameters")
                assert found == tuple(rank for rank, keeps in enumerate(keep) if keeps)
                for rank, kind in product(kept.holders(block), KEPT_KINDS):
                    keeps_it = keeping(kept, rank, kind)(block, block.layer)
                    assert keeps_it == (rank in keepers(kept, block, kind))


def test_blocks_do_not_depend_on_replicas_or_stages() -> None:
    layers = layers_of(tensor=2)
    assert (
        plan_of(Mesh.of(tensor=2, data=1, pipeline=1), layers).blocks
        == plan_of(Mesh.of(tensor=2, data=3, pipeline=2), layers).blocks
    )


def test_equal_inputs_give_equal_plans() -> None:
    one, other = (
        plan_of(Mesh.of(tensor=2, data=3, pipeline=2), schedule="zb-h1") for _ in range(2)
    )
    assert one == other
    assert one.owners == other.owners
    assert [training_program(one, r) for r in range(12)] == [
        training_program(other, r) for r in range(12)
    ]


def test_another_layout_is_reached_by_transfers() -> None:
    old = optimizer_layout(plan_of(Mesh.of(tensor=1, data=2, pipeline=2)))
    new = optimizer_layout(plan_of(Mesh.of(tensor=1, data=3, pipeline=1)))
    moved = sum(move.box.elements for move in transfers(old, new, cost=lambda *_: 1.0))
    total = sum(
        block.elements for block in plan_of(Mesh.of(tensor=1, data=1, pipeline=1)).blocks[0]
    )
    assert 0 < moved < total


def test_a_plan_for_a_hundred_thousand_ranks() -> None:
    layers = layers_of(32, tensor=8)
    mesh = Mesh.of(tensor=8, data=782, pipeline=16)
    plan = plan_of(mesh, layers, micro_batches=3128, virtual=2, schedule="interleaved-1f1b")
    assert mesh.size > 100_000
    rank = mesh.rank(3, 500, 7)
    assert plan.chunks_of(rank) == (7, 23)
    assert {a.peer for a in training_program(plan, rank)} == {
        None,
        mesh.rank(3, 500, 6),
        mesh.rank(3, 500, 8),
    }
    assert all(
        len(owners) == len(found) for owners, found in zip(plan.owners, plan.blocks, strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"virtual": 3, "schedule": "interleaved-1f1b"}, "layers = 4 is not divisible"),
        ({"micro_batches": 1}, "1 micro-batches, fewer than"),
        ({"blocks_per_chunk": [1, 1]}, "add up to model.layers = 4"),
        ({"blocks_per_chunk": [5, -1]}, "a chunk would have no layer"),
        (
            {"blocks_per_chunk": [2, 0, 0, 2], "virtual": 2, "schedule": "interleaved-1f1b"},
            "a chunk would have no layer",
        ),
        ({"schedule": "zb-v"}, "set parallel.virtual = 2"),
        ({"schedule": "fastest"}, "allowed are 'gpipe'"),
        ({"micro_batch_order": "sideways"}, "allowed are 'ascending'"),
        ({"block_elements": 0}, "block_elements = 0 is too small"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(Mesh.of(tensor=1, data=2, pipeline=2), **changes)


def test_a_mesh_that_the_layers_were_not_cut_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"split into 1 parts, .*tensor 2 holds 2"):
        plan_of(Mesh.of(tensor=2, data=1, pipeline=2), layers_of(tensor=1))
    with pytest.raises(ConfigError, match=r"parallel.data = 0 is too small"):
        plan_of(Mesh.of(tensor=1, data=0, pipeline=2))


def test_the_outer_chunks_may_have_no_block() -> None:
    plan = plan_of(Mesh.of(tensor=1, data=1, pipeline=3), blocks_per_chunk=[0, 4, 0])
    names = [[plan.layers[i].name for i in plan.layers_of(c)] for c in range(3)]
    assert (names[0], names[2]) == (["embedding"], ["head"])


def loads(sizes: list[int], owners: tuple[int, ...], ranks: int) -> list[int]:
    return [sum(s for s, o in zip(sizes, owners, strict=True) if o == r) for r in range(ranks)]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_first_owners_are_balanced_from_any_block_to_the_last(sizes: list[int], ranks: int) -> None:
    owners = spread_owners(sizes, [tuple(range(ranks))] * len(sizes))
    for first in range(len(sizes)):  # a backward pass brings the last blocks first
        rest = sizes[first:]
        assert max(loads(rest, owners[first:], ranks)) <= sum(rest) / ranks + max(rest)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 8))
def test_assigned_owners_are_balanced_and_contiguous(sizes: list[int], ranks: int) -> None:
    owners = assign_owners(sizes, [tuple(range(ranks))] * len(sizes))
    assert list(owners) == sorted(owners)
    assert max(loads(sizes, owners, ranks)) <= sum(sizes) / ranks + max(sizes)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(2, 8), st.randoms())
def test_a_lost_owner_moves_only_its_blocks(
    sizes: list[int], ranks: int, chance: random.Random
) -> None:
    before = assign_owners(sizes, [tuple(range(ranks))] * len(sizes))
    lost = chance.randrange(ranks)
    left = tuple(rank for rank in range(ranks) if rank != lost)
    after = assign_owners(sizes, [left] * len(sizes), before)
    kept = loads(sizes, before, ranks)
    limit = sum(sizes) / len(left) + max(sizes)
    assert max(loads(sizes, after, ranks)) <= limit
    if max(kept[rank] for rank in left) <= limit:
        assert all(o == n for o, n in zip(before, after, strict=True) if o != lost)


@given(st.lists(st.integers(1, 100), min_size=8, max_size=60), st.integers(1, 6))
def test_a_new_candidate_takes_only_what_balance_needs(sizes: list[int], ranks: int) -> None:
    before = assign_owners(sizes, [tuple(range(ranks))] * len(sizes))
    after = assign_owners(sizes, [tuple(range(ranks + 1))] * len(sizes), before)
    limit = sum(sizes) / (ranks + 1) + max(sizes)
    assert max(loads(sizes, after, ranks + 1)) <= limit
    moved = sum(s for s, o, n in zip(sizes, before, after, strict=True) if o != n)
    excess = sum(max(0.0, load - limit) for load in loads(sizes, before, ranks))
    assert moved <= excess + ranks * max(sizes)


def test_blocks_are_whole_rows_of_about_the_asked_size() -> None:
    layers = layers_of(2)
    for block in blocks(layers, 0, 100):
        spec = layers[block.layer].parameters[0][block.spec_index]
        assert block.elements == (block.row_stop - block.row_start) * spec.row_elements
        assert block.elements <= max(100, spec.row_elements)
