"""Plans and buffers of small models, for tests of what ranks send each other."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import nn

from holdfast.parallel.layout import HeldRow
from holdfast.parallel.layout.mesh import Mesh
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.plan import Plan, Roster, make_plan, replan
from holdfast.trainer.models import layer_specs
from holdfast.trainer.models.llama.family import LlamaConfig
from holdfast.trainer.step.planning import with_matrices

NODES = {rank: f"node-{rank}" for rank in range(16)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"data": 4},
    "pipeline": {"data": 3, "pipeline": 2},
    "virtual": {"data": 2, "pipeline": 2, "virtual": 2, "schedule": "zb-v"},
    "tensor": {"data": 3, "tensor": 2},
    "alone": {"data": 1},
    "shared in groups": {"data": 4, "shard": "parameters", "shard_group": 2},
    "shared": {"data": 3, "tensor": 2, "shard": "parameters"},
    "shared over stages": {"data": 4, "pipeline": 2, "shard": "gradients", "shard_group": 2},
    "matrices in parts": {"data": 2, "tensor": 2, "matrices": True},
    "shared matrices in parts": {
        "data": 2,
        "tensor": 4,
        "kv_heads": 2,
        "shard": "parameters",
        "matrices": True,
    },
    "shared beside copied heads": {"data": 2, "tensor": 4, "shard": "gradients", "kv_heads": 2},
}


@cache
def plan_of(layout: str, *, tied: bool) -> Plan:
    sizes = dict(LAYOUTS[layout])
    virtual, schedule = sizes.pop("virtual", 1), sizes.pop("schedule", "1f1b")
    matrices = sizes.pop("matrices", False)
    shard, group = sizes.pop("shard", "optimizer"), sizes.pop("shard_group", 0)
    model = LlamaConfig(
        family="llama",
        layers=4,
        hidden=24,
        heads=4,
        kv_heads=sizes.pop("kv_heads", 4),
        vocab=70,
        tie_embeddings=tied,
    )
    layers = layer_specs(
        model,
        tensor=sizes.get("tensor", 1),
        sequence_parallel=False,
        seq_len=16,
        micro_batch=1,
        precision="fp32",
        recompute="none",
    )
    return make_plan(
        [with_matrices(layer) for layer in layers] if matrices else layers,
        Mesh.of(**sizes),
        virtual=virtual,
        schedule=schedule,
        micro_batches=6,
        block_elements=500,
        shard=shard,
        shard_group=group,
    )


def after_a_loss(plan: Plan) -> Plan:
    left = tuple(rank for rank in plan.stage_replicas.ranks if rank != 1)
    return replan(plan, Roster(left, NODES), generation=1, redundancy=1)


def buffer_of(plan: Plan, rank: int) -> ParameterBuffer:
    rows: list[tuple[HeldRow, nn.Parameter]] = []
    for chunk in plan.chunks_of(rank):
        for layer in plan.layers_of(chunk):
            held = plan.rows_of(rank, layer)
            sizes: Counter[tuple[int, str]] = Counter()
            for row in held:
                sizes[row.part, row.spec.local] += row.spec.elements
            local = {key: nn.Parameter(torch.empty(size)) for key, size in sizes.items()}
            rows += [(row, local[row.part, row.spec.local]) for row in held]
    return ParameterBuffer(rows)
