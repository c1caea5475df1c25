"""A precision is one entry of one registry: sizes, dtypes, file names, estimates follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import Store

from holdfast.checkpoint.format.dtypes import TORCH_DTYPES
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.plan.cost import rank_memory
from holdfast.parallel.precision import PRECISIONS, Precision, precision_of
from holdfast.trainer.config import RunConfig, check_config
from holdfast.trainer.step.planning import plan_of
from holdfast.trainer.step.saved_tensors import saved_tensors, state_format
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config

HALF = Precision("fp16", "float16", "F16", 2, state_name="fp32")


@contextmanager
def half_precision() -> Iterator[None]:
    """fp16 as a precision of training."""
    with mock.patch.dict(PRECISIONS, {HALF.name: HALF}):  # type: ignore[arg-type]
        yield


def half_config(**parallel: int) -> RunConfig:
    train = {"steps": 3, "global_batch": 4, "precision": HALF.name}
    return make_config(model={"layers": 2}, train=train, parallel=dict(parallel))


@pytest.mark.parametrize("name", PRECISIONS)
def test_names_and_sizes_are_those_of_torch_and_of_files(name: str) -> None:
    precision = PRECISIONS[name]
    assert precision.bytes == precision.dtype.itemsize
    assert TORCH_DTYPES[precision.stored] == precision.dtype
    assert precision_of(precision.dtype) is precision
    assert precision.state.state is precision.state
    assert precision.has_master == (precision.state.bytes > precision.bytes)


def test_a_dtype_that_is_no_precision_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"float16; known are fp32, bf16, fp64"):
        precision_of(torch.float16)


def test_a_configuration_may_name_what_the_registry_has() -> None:
    config = half_config()
    with pytest.raises(ConfigError, match=r"train.precision = 'fp16'.*'fp32', 'bf16', 'fp64'"):
        check_config(config)
    with half_precision():
        check_config(config)


def test_another_precision_is_saved_and_estimated_by_its_entry() -> None:
    with half_precision():
        config = half_config()
        plan, form = plan_of(config), state_format(config)
        dtypes = {tensor.kind: tensor.dtype for tensor in saved_tensors(plan, form)}
        memory = rank_memory(plan, 0, precision=HALF, owned_bytes=form.owned_bytes, exact=True)
    assert dtypes["weight"] == "F16"
    assert {dtypes[kind] for kind in dtypes if kind != "weight"} == {"F32"}
    assert "master" in dtypes
    assert memory == rank_memory(plan, 0, precision=PRECISIONS["bf16"], owned_bytes=16, exact=True)


def train_in_half(rank: int, world_size: int, store: Store, *, data: int) -> Any:
    from holdfast.trainer.step.build import open_training
    from holdfast.trainer.worlds.world import local_world

    config = half_config(data=data)
    with half_precision():
        training = open_training(config, local_world(rank, world_size), store)
        losses = []
        for step in range(config.train.steps):
            training.compute(step)
            losses.append(training.vote(*training.reduce()).loss.hex())
            training.apply(config.rate_of(step))
        return losses, training.parameter_digest(), str(training.parameter_buffer.values.dtype)


@pytest.mark.mp
def test_another_precision_trains_with_the_same_bits_in_two_layouts(cluster: Cluster) -> None:
    [alone] = cluster.run(f"{__name__}:train_in_half", 1, data=1)
    assert alone[2] == "torch.float16"
    assert len(set(alone[0])) == 3
    assert cluster.run(f"{__name__}:train_in_half", 2, data=2) == [alone, alone]
