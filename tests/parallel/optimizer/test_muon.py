"""Muon is torch.optim.Muon, each matrix on one owner whole, with the same bits in every layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import example, given, strategies as st
from torch import Tensor

from holdfast.parallel.layout import Box, without
from holdfast.parallel.plan import rank_memory
from holdfast.parallel.plan.ownership import matrix_work, spread_owners
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.check.reference import run_reference
from holdfast.trainer.check.tiny import tiny_config
from holdfast.trainer.config import RunConfig, convert_config
from holdfast.trainer.models import FAMILIES
from holdfast.trainer.step.planning import layers_of_config, plan_of
from support.oracles.plain_llama import PlainLlama
from support.oracles.plain_training import (
    assert_equal_steps,
    run_here,
    train_here,
    twenty_steps,
)
from support.processes.cluster import Cluster
from support.runs.small_runs import (
    events_of,
    make_config,
    metrics_of,
    run_in,
    run_training,
    world_size_of,
)

LAYOUTS: list[dict[str, Any]] = [
    {"data": 2},
    {"pipeline": 2, "data": 2, "schedule": "zb-h1"},
    {"data": 2, "shard": "parameters"},
]
SHARDED: dict[str, Any] = {"numerics": {"tensor_shards": 4}, "model": {"heads": 4, "kv_heads": 2}}
"""Four parts of each matrix, and two of the keys' and values'."""
SHARDED_LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2},
    {"tensor": 4, "sequence_parallel": True},
    {"tensor": 2, "pipeline": 2, "schedule": "zb-h1"},
    {"tensor": 2, "data": 2, "shard": "gradients"},
    {"tensor": 2, "data": 2, "shard": "parameters"},
]


def of(**sections: Any) -> RunConfig:
    own = {"name": "muon", "lr": 2e-3, **sections.pop("optimizer", {})}
    precision = sections.pop("train", {}).get("precision", "fp64")
    config = twenty_steps(optimizer=own, **sections)
    train = msgspec.structs.replace(config.train, precision=precision)
    return msgspec.structs.replace(config, train=train)


def few_steps(stop_after: int = 0, **sections: Any) -> RunConfig:
    """A run that is long enough for bits to differ."""
    config = of(**sections)
    train = msgspec.structs.replace(config.train, steps=6, stop_after=stop_after)
    return msgspec.structs.replace(config, train=train)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process gives."""
    return run_here(few_steps())


@pytest.fixture(scope="module")
def alone_sharded() -> dict[str, Any]:
    """What one process gives that has all tensor shards."""
    return run_here(few_steps(**SHARDED))


@pytest.fixture
def torch_in_full_precision() -> Iterator[None]:
    """torch.optim.Muon, which iterates in bf16, keeps the precision of its input."""
    with mock.patch.object(Tensor, "bfloat16", Tensor.clone):
        yield


def of_torch(plain: PlainLlama, **muon: Any) -> list[torch.optim.Optimizer]:
    named = dict(plain.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "layers" in name]
    edges = [p for name, p in named.items() if p.ndim == 2 and "layers" not in name]
    norms = [p for p in named.values() if p.ndim == 1]
    assert sum(map(len, (matrices, edges, norms))) == len(named)
    rest = [{"params": edges}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, **muon),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    ]


@pytest.mark.parametrize(
    ("scale", "nesterov", "momentum"),
    [("match_rms_adamw", True, 0.95), ("original", False, 0.9)],
)
@pytest.mark.usefixtures("torch_in_full_precision")
def test_muon_is_that_of_torch_in_full_precision(
    scale: str, nesterov: bool, momentum: float
) -> None:
    own = {
        "muon_precision": "full",
        "muon_scale": scale,
        "muon_nesterov": nesterov,
        "muon_momentum": momentum,
    }
    assert_equal_steps(
        of(optimizer=own),
        lambda plain: of_torch(plain, adjust_lr_fn=scale, nesterov=nesterov, momentum=momentum),
    )


def test_muon_is_that_of_torch_in_bf16() -> None:
    # Products of other layouts of the operands are rounded otherwise, to 8 bits.
    assert_equal_steps(
        of(), lambda plain: of_torch(plain, adjust_lr_fn="match_rms_adamw"), rel=2e-3
    )


@pytest.mark.mp
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bits_are_equal_in_every_layout(
    cluster: Cluster, alone: dict[str, Any], layout: dict[str, Any]
) -> None:
    assert run_training(cluster, few_steps(parallel=layout)) == alone


@pytest.mark.usefixtures("torch_in_full_precision")
def test_matrices_in_parts_are_those_of_torch() -> None:
    assert_equal_steps(
        of(optimizer={"muon_precision": "full"}, **SHARDED),
        lambda plain: of_torch(plain, adjust_lr_fn="match_rms_adamw"),
    )


@pytest.mark.mp
@pytest.mark.parametrize("layout", SHARDED_LAYOUTS, ids=str)
def test_bits_are_equal_wherever_the_parts_of_a_matrix_lie(
    cluster: Cluster, alone_sharded: dict[str, Any], layout: dict[str, Any]
) -> None:
    assert run_training(cluster, few_steps(parallel=layout, **SHARDED)) == alone_sharded


@pytest.mark.mp
def test_parts_of_a_matrix_are_updated_on_the_host(
    cluster: Cluster, alone_sharded: dict[str, Any]
) -> None:
    config = few_steps(parallel={"tensor": 2}, optimizer={"state": "host"}, **SHARDED)
    assert run_training(cluster, config) == alone_sharded


@pytest.mark.mp
@pytest.mark.parametrize("memory", ["device", "host"])
def test_shadows_make_the_same_matrices(
    cluster: Cluster, alone: dict[str, Any], alone_sharded: dict[str, Any], memory: str
) -> None:
    parts = memory == "host"
    layout = {"tensor": 2, "data": 2} if parts else {"data": 2}
    config = few_steps(
        parallel=layout, elastic={"shadow_memory": memory}, **(SHARDED if parts else {})
    )
    expected = alone_sharded if parts else alone
    plain, ranks = msgspec.to_builtins(config), world_size_of(config)
    for found in cluster.run("support.runs.small_runs:train_with_shadows", ranks, config=plain):
        assert found == (expected["losses"], expected["digest"], True, 0)


@pytest.mark.mp
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_a_run_goes_on_in_other_layouts(
    cluster: Cluster, alone_sharded: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    """Ranks load parts that they do not compute with, and master values of these in bf16."""
    sections: dict[str, Any] = {**SHARDED, "train": {"precision": precision}}
    expected = run_here(few_steps(**sections)) if precision == "bf16" else alone_sharded
    for stop, layout in ((2, {"tensor": 2}), (4, {"tensor": 4}), (0, {})):
        config = few_steps(stop, parallel=layout, **sections)
        if layout:
            run_in(cluster, config, tmp_path)
        else:
            train_here(config, tmp_path)
    assert [line["loss_hex"] for line in metrics_of(tmp_path)] == expected["losses"]
    [*_, finished] = events_of(tmp_path, "run_finished")
    assert finished["parameter_digest"] == expected["digest"]


def test_a_matrix_is_one_block_and_other_parameters_are_cut() -> None:
    plan = plan_of(of(parallel={"data": 2}))
    rows: dict[str, set[int]] = {}
    for block in plan.blocks[0]:
        spec = plan.spec_of(block)
        is_matrix = "layers" in spec.name and len(spec.shape) == 2
        assert bool(block.weight) == is_matrix
        if is_matrix:
            assert (block.row_stop - block.row_start, block.elements) == (spec.rows, spec.elements)
        rows.setdefault(spec.name, set()).add(block.row_start)
    assert len(rows["model.embed_tokens.weight"]) > 1
    sizes = (8, 4)
    assert matrix_work(*sizes) == matrix_work(*sizes[::-1]) == 32 + 5 * (4 * 16 * 8 + 2 * 64) // 16


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 7))
def test_owners_are_balanced_by_the_work_of_matrices(sizes: list[int], ranks: int) -> None:
    candidates = [tuple(range(ranks))] * len(sizes)
    owners = spread_owners(sizes, candidates, range(len(sizes)))
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == r) for r in range(ranks)]
    # The fullest rank had at most the mean of what was given before it got its smallest one.
    fullest = loads.index(max(loads))
    last = min(s for s, o in zip(sizes, owners, strict=True) if o == fullest)
    assert ranks * (loads[fullest] - last) <= sum(sizes) - last
    assert spread_owners(sizes, candidates, ()) == spread_owners(sizes, candidates)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 4))
@example([61, 65, 67, 134, 113, 118, 124], 5)  # its best is a quarter above the mean
def test_owners_of_few_matrices_are_near_the_best(sizes: list[int], ranks: int) -> None:
    """Graham 1969: longest processing time first is within 4/3 - 1/(3 ranks) of the best."""
    owners = spread_owners(sizes, [tuple(range(ranks))] * len(sizes), range(len(sizes)))
    best = min(largest_load(sizes, any_) for any_ in product(range(ranks), repeat=len(sizes)))
    assert 3 * ranks * largest_load(sizes, owners) <= (4 * ranks - 1) * best


def largest_load(sizes: Sequence[int], owners: Sequence[int]) -> int:
    loads = Counter[int]()
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    return max(loads.values())


def test_a_split_matrix_has_one_owner_among_all_ranks_of_its_stage() -> None:
    config = of(parallel={"tensor": 4, "data": 2, "pipeline": 2}, **SHARDED)
    plan = plan_of(config)
    names = [
        {plan.spec_of(plan.block(key)).name for key in keys} for keys in plan.given_together[0]
    ]
    assert all(len(found) == 1 for found in names)
    matrices = {
        spec.name
        for layer in plan.layers
        for spec in layer.parameters[0]
        if "layers" in spec.name and len(spec.shape) == 2
    }
    assert set().union(*names) == matrices
    work = Counter(
        {
            rank: sum(plan.block(key).work for key in plan.owned_blocks(rank))
            for rank in plan.stage_replicas.ranks
        }
    )
    assert {plan.owner(keys[0]) for keys in plan.given_together[0]} <= set(work)
    largest = max(sum(plan.block(k).work for k in keys) for keys in plan.given_together[0])
    for stage in range(2):
        loads = [work[rank] for rank in plan.ranks_of((0, 1, 2, 3), stage)]
        assert max(loads) <= sum(loads) / len(loads) + largest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_each_matrix_are_all_of_it(family: str, parts: int) -> None:
    """That of each projection, also where a family stores several as one tensor."""
    model = {"family": family, "layers": 2, "hidden": 32, "heads": 4, "vocab": 67}
    config = convert_config(
        {
            "model": model,
            "numerics": {"tensor_shards": parts},
            "optimizer": {"name": "muon"},
            "train": {"seq_len": 16},
        }
    )
    found: dict[tuple[int, int, str], dict[Box, Box]] = {}
    for layer, described in enumerate(layers_of_config(config)):
        for table in described.parameters:
            for row, spec in enumerate(table):
                if spec.whole is not None and spec.balance is None:
                    found.setdefault((layer, row, spec.name), {})[spec.box] = spec.whole
    assert found
    for boxes in found.values():
        [whole] = set(boxes.values())
        assert len(whole.shape) == 2
        assert not without([whole], sorted(boxes, key=lambda box: box.start))
        assert sum(box.elements for box in boxes) == whole.elements


def test_memory_counts_parts_of_which_a_rank_is_the_owner_alone() -> None:
    config = of(parallel={"tensor": 2}, train={"precision": "fp32"})
    plan = plan_of(config)
    fp32 = PRECISIONS["fp32"]
    found = [
        rank_memory(plan, rank, precision=fp32, owned_bytes=12, exact=True) for rank in range(2)
    ]
    guests = [k for rank in range(2) for k in plan.owned_blocks(rank) if plan.is_guest(k)]
    assert guests
    held = sum(
        row.spec.elements for rank in range(2) for n in range(4) for row in plan.rows_of(rank, n)
    )
    elements = held + sum(plan.block(key).elements for key in guests)
    assert sum(memory.parameters for memory in found) == 4 * elements


def test_the_check_compares_with_another_implementation() -> None:
    config = make_config(
        model={"layers": 2, "dropout": 0.0}, train={"steps": 4}, optimizer={"name": "muon"}
    )
    tiny = tiny_config(config, 4)
    assert tiny.optimizer.muon_precision == "full"  # type: ignore[attr-defined]
    losses = [float.fromhex(loss) for loss in run_here(tiny)["losses"]]
    assert losses == pytest.approx(run_reference(tiny).losses, rel=1e-9)
