"""What tests with Megatron-Core share: workers whose calls of CUDA the processor answers."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from support.processes.cluster import Cluster

MEGATRON = (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer.distrib_optimizer",
    "support.foreign.megatron_training",
)


@pytest.fixture(scope="session")
def megatron_pool() -> Iterator[Cluster]:
    if find_spec("megatron") is None:
        pytest.skip("Megatron-Core is not installed")
    pool = Cluster(4, imports=MEGATRON)
    yield pool
    pool.close()
