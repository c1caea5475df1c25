"""Muon is torch.optim.Muon, each matrix on one owner whole, with the same bits in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.plan.ownership import matrix_work, spread_owners
from holdfast.trainer.check.reference import run_reference
from holdfast.trainer.check.tiny import tiny_config
from holdfast.trainer.config import RunConfig, check_config
from holdfast.trainer.step.planning import plan_of
from support.oracles.plain_llama import PlainLlama
from support.oracles.plain_training import (
    assert_equal_steps,
    run_here,
    train_here,
    twenty_steps,
)
from support.processes.cluster import Cluster
from support.runs.small_runs import events_of, make_config, metrics_of, run_training

LAYOUTS: list[dict[str, Any]] = [
    {"data": 2},
    {"pipeline": 2, "data": 2, "schedule": "zb-h1"},
    {"data": 2, "shard": "parameters"},
]


def of(**sections: Any) -> RunConfig:
    own = {"name": "muon", "lr": 2e-3, **sections.pop("optimizer", {})}
    return twenty_steps(optimizer=own, **sections)


def few_steps(stop_after: int = 0, **sections: Any) -> RunConfig:
    """A run that is long enough for bits to differ."""
    config = of(**sections)
    train = msgspec.structs.replace(config.train, steps=6, stop_after=stop_after)
    return msgspec.structs.replace(config, train=train)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process gives."""
    return run_here(few_steps())


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


@pytest.mark.mp
def test_shadows_make_the_same_matrices(cluster: Cluster, alone: dict[str, Any]) -> None:
    plain = msgspec.to_builtins(few_steps(parallel={"data": 2}))
    for found in cluster.run("support.runs.small_runs:train_with_shadows", 2, config=plain):
        assert found == (alone["losses"], alone["digest"], True, 0)


@pytest.mark.mp
def test_a_run_goes_on_in_another_layout(
    cluster: Cluster, alone: dict[str, Any], tmp_path: Path
) -> None:
    plain = msgspec.to_builtins(few_steps(3, parallel={"data": 2}))
    cluster.run("support.runs.small_runs:train_in", 2, config=plain, root=str(tmp_path))
    train_here(few_steps(), tmp_path)
    assert [line["loss_hex"] for line in metrics_of(tmp_path)] == alone["losses"]
    [finished] = events_of(tmp_path, "run_finished")
    assert finished["parameter_digest"] == alone["digest"]


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
    # Graham 1969: longest processing time first is within 4/3 - 1/(3 ranks) of the best.
    best = max(max(sizes), -(-sum(sizes) // ranks))
    spare = sorted(sizes)[-ranks - 1 :]
    if len(sizes) > ranks:
        best = max(best, spare[0] + spare[1])
    assert max(loads) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9
    assert spread_owners(sizes, candidates, ()) == spread_owners(sizes, candidates)


def test_the_check_compares_with_another_implementation() -> None:
    config = make_config(
        model={"layers": 2, "dropout": 0.0}, train={"steps": 4}, optimizer={"name": "muon"}
    )
    tiny = tiny_config(config, 4)
    assert tiny.optimizer.muon_precision == "full"  # type: ignore[attr-defined]
    losses = [float.fromhex(loss) for loss in run_here(tiny)["losses"]]
    assert losses == pytest.approx(run_reference(tiny).losses, rel=1e-9)


def test_parts_of_a_matrix_are_refused() -> None:
    for sections in ({"parallel": {"tensor": 2}}, {"numerics": {"tensor_shards": 2}}):
        config = make_config(optimizer={"name": "muon"}, **sections)
        with pytest.raises(ConfigError, match="a matrix is updated whole, and its parts are not"):
            check_config(config)
