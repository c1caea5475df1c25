"""Plans that tests start from, and what must hold of every plan and of every move of state
between two.
"""

from __future__ import annotations

from functools import cache

from holdfast.parallel.layout import LayerSpec
from holdfast.parallel.layout.mesh import Mesh
from holdfast.parallel.plan.block_transfers import plan_block_transfers
from holdfast.parallel.plan.initial import make_plan
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.plan.programs import training_program
from holdfast.parallel.plan.replan import Roster, with_shadows
from holdfast.parallel.schedules import check_programs
from holdfast.trainer.models import layer_specs
from holdfast.trainer.models.llama.family import LlamaConfig
from holdfast.trainer.models.mixtral.family import MixtralConfig
from holdfast.trainer.step.planning import with_matrices

MICRO_BATCHES = 8
NODES = {rank: f"node-{rank % 3}" for rank in range(64)}


def small_layers(
    layers: int,
    tensor: int,
    *,
    shards: int = 1,
    seq_len: int = 16,
    sequence_parallel: bool = False,
    experts: int = 0,
) -> tuple[LayerSpec, ...]:
    """The layers of a small model, split for `tensor` ranks or `shards` parts."""
    sizes = {"layers": layers, "hidden": 32, "heads": 4, "kv_heads": 4, "vocab": 64}
    model = LlamaConfig(family="llama", **sizes)
    if experts:
        model = MixtralConfig(family="mixtral", experts=experts, intermediate=8, **sizes)
    return layer_specs(
        model,
        tensor=tensor,
        sequence_parallel=sequence_parallel,
        seq_len=seq_len,
        micro_batch=1,
        precision="fp32",
        recompute="none",
        shards=shards,
    )


@cache
def first_plan(
    schedule: str = "1f1b",
    virtual: int = 1,
    tensor: int = 1,
    data: int = 2,
    pipeline: int = 2,
    *,
    sequence_parallel: bool = False,
    matrices: bool = False,
    count: int = 12,
    experts: int = 0,
    expert_ranks: int = 1,
) -> Plan:
    """A plan with shadows; with `matrices` those of layers are updated as such."""
    layers = small_layers(count, tensor, sequence_parallel=sequence_parallel, experts=experts)
    plan = make_plan(
        [with_matrices(layer) for layer in layers] if matrices else layers,
        Mesh.of(tensor=tensor, data=data, pipeline=pipeline),
        virtual=virtual,
        schedule=schedule,
        micro_batches=MICRO_BATCHES,
        block_elements=2000,
    ).evolved(expert_ranks=expert_ranks)
    return with_shadows(plan, Roster(plan.stage_replicas.ranks, NODES), 1)


def check(plan: Plan, ranks: set[int]) -> None:
    """What must hold of every plan."""
    assert set(plan.stage_replicas.ranks) == ranks
    for index in range(plan.configured_mesh.shards):
        programs = {
            rank: training_program(plan, rank)
            for rank in plan.stage_replicas.ranks
            if plan.stage_replicas.find(rank) is not None
            and plan.stage_replicas.shard_index(rank) == index
        }
        check_programs(programs, len(plan.placement), range(MICRO_BATCHES))
        only = frozenset({1, 4, 6})
        some = {rank: training_program(plan, rank, only) for rank in programs}
        check_programs(some, len(plan.placement), sorted(only))
    for group in plan.given_together:
        for keys in group:
            [owner] = {plan.owner(key) for key in keys}
            [shadows] = {plan.shadows[part][place] for part, place in keys}
            assert len({plan.followers(key) for key in keys}) == 1
            assert owner in plan.candidates(keys)
            assert owner not in shadows
            assert len(set(shadows)) == len(shadows) == min(1, len(ranks) - 1)
            if len({NODES[rank] for rank in ranks}) > 1:
                assert all(NODES[rank] != NODES[owner] for rank in shadows)
    for stage in range(plan.stage_replicas.pipeline):
        counts = [
            len(plan.micro_batches_of(stage, r)) for r in range(plan.stage_replicas.replicas(stage))
        ]
        assert sum(counts) == MICRO_BATCHES
        assert max(counts) - min(counts) <= 1


def check_moves(plan: Plan, held: dict, needed: dict) -> None:
    """Every rank gets the blocks it lacks, once, from a rank that has them."""
    block_transfers = plan_block_transfers(plan, held, needed, NODES)
    brought: dict[int, list] = {}
    for transfer in block_transfers:
        assert set(transfer.keys) <= held[transfer.source]
        brought.setdefault(transfer.target, []).extend(transfer.keys)
    for rank, keys in needed.items():
        got = brought.get(rank, [])
        assert len(got) == len(set(got))
        assert set(got) == keys - held.get(rank, set())
