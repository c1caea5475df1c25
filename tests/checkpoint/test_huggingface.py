"""A checkpoint folder is a Hugging Face model folder: transformers opens it as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import load
from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.trainer.models.chunk import build_whole_model
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, run_in


@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
def test_transformers_gives_our_logits(
    cluster: Cluster, tmp_path: Path, tie: bool, tensor: int
) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(
        model={"tie_embeddings": tie, "dropout": 0.0, "layers": 2},
        train={"steps": 4, "global_batch": 4},
        checkpoint={"every": 2, "keep": 0},
        parallel={"tensor": tensor, "data": 2},
    )
    run_in(cluster, config, tmp_path)
    ours = build_whole_model(
        config.model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        seq_len=config.train.seq_len,
        micro_batch=3,
        seed=1,
    )
    tokens = torch.randint(67, (3, 16), generator=torch.Generator().manual_seed(5))
    seen = []
    for step in (2, 4):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        theirs: Any = AutoModelForCausalLM.from_pretrained(str(folder))
        assert theirs.config.tie_word_embeddings is tie
        buffer = ParameterBuffer(ours.rows())
        weights: dict[str, Any] = {}
        for segment in buffer.segments:
            weights.setdefault(segment.spec.name, buffer.view(segment))
        load(folder, weights)
        for segment in buffer.segments:
            buffer.view(segment).copy_(weights[segment.spec.name])
        logits = theirs(tokens).logits
        torch.testing.assert_close(ours.logits(tokens), logits, rtol=0, atol=1e-5)
        seen.append(logits)
    assert not torch.equal(*seen)
