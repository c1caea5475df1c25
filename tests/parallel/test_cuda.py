"""On a GPU the same integers, the same masks and, to rounding, the same training as on CPU."""

from __future__ import annotations

import pytest
import torch

from holdfast.parallel.keyed_random import dropout, stream_key
from holdfast.parallel.optimizer.kernels.torch_operations import fixed_point
from holdfast.trainer.step.build import open_training
from holdfast.trainer.worlds.world import local_world
from support.runs.small_runs import make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: run it on a GPU machine with a CUDA build of torch",
    ),
]


def test_fixed_point_integers_equal_those_of_the_cpu() -> None:
    gradient = torch.randn(4097, generator=torch.Generator().manual_seed(1)) * 100
    on_cpu, on_gpu = fixed_point(gradient, 44)[0], fixed_point(gradient.cuda(), 44)[0]
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_masks_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    key = stream_key(3, "mask")
    value = torch.ones(1001, dtype=dtype)
    on_cpu = dropout(value, key, offset=17, probability=0.2)
    on_gpu = dropout(value.cuda(), key, offset=17, probability=0.2)
    assert torch.equal(on_gpu.cpu() != 0, on_cpu != 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_agrees_with_the_cpu(precision: str) -> None:
    losses: dict[str, list[float]] = {}
    for device in ("cpu", "cuda"):
        config = make_config(train={"device": device, "precision": precision, "steps": 5})
        store = torch.distributed.HashStore()
        training = open_training(config, local_world(0, 1), store)
        losses[device] = []
        for step in range(config.train.steps):
            training.compute(step)
            outcome = training.vote(*training.reduce())
            training.apply(config.rate_of(step))
            losses[device].append(outcome.loss)
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=tolerance)
