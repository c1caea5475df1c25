"""What a layer is said to keep for its backward pass, against what autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.parallel.pipeline import Batch, MicroBatchContext
from holdfast.parallel.precision import PRECISIONS
from holdfast.parallel.tensor_parallel import TensorParallel
from holdfast.trainer.config import convert_config
from holdfast.trainer.models import build_chunk, layer_specs

SEQ_LEN = 256
SIZES = {"layers": 1, "hidden": 128, "intermediate": 448, "heads": 4, "kv_heads": 2, "vocab": 2048}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"kv_heads": 4},
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen3": {"head_dim": 64},
    "deepseek_v3": {"head_dim": 0, "kv_heads": 4, "multi_token_layers": 1},
    "mixtral": {"experts": 8, "experts_per_token": 2},
    "qwen3_moe": {
        "experts": 16,
        "experts_per_token": 8,
        "expert_intermediate": 96,
        "head_dim": 64,
    },
}


def _saved_bytes(module: Any, values: Any, context: MicroBatchContext) -> tuple[Any, int]:
    """The module's output, and the bytes of the storages that autograd keeps beside weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(values, context)
    return output, sum(found.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("family", MODELS)
def test_a_layer_keeps_what_is_planned(family: str, precision: str, recompute: str) -> None:
    model = convert_config({"model": {"family": family, **SIZES, **MODELS[family]}}).model
    specs = layer_specs(
        model,
        tensor=1,
        sequence_parallel=False,
        seq_len=SEQ_LEN,
        micro_batch=1,
        precision=precision,
        recompute=recompute,
    )
    chunk = build_chunk(
        model,
        range(len(specs)),
        specs,
        tensor_parallel=TensorParallel(None, False),
        dtype=PRECISIONS[precision].dtype,
        device=torch.device("cpu"),
        seq_len=SEQ_LEN,
        seed=1,
    )
    tokens = torch.randint(0, model.vocab, (1, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    context, values = MicroBatchContext(0, 0, True, Batch(tokens, tokens)), None
    for spec, (_, module) in zip(specs, chunk.modules_by_layer(), strict=True):
        values, saved = _saved_bytes(module, values, context)
        if spec.name != "embedding":
            assert spec.activation_bytes == pytest.approx(saved, rel=0.08), spec.name
