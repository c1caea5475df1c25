"""GPT-2's keys, of which some follow from others and some are refused, and the bytes of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.pipeline import Batch, MicroBatchContext
from holdfast.trainer.config import convert_config
from holdfast.trainer.config.rules import problems_of
from holdfast.trainer.models import build_whole_model, family_of, layer_specs
from holdfast.trainer.models.gpt2.family import GPT2Config


def model(hidden: int = 768, **keys: Any) -> GPT2Config:
    return GPT2Config(family="gpt2", layers=12, hidden=hidden, vocab=50257, **keys)


def problems(**keys: Any) -> list[str]:
    return list(family_of("gpt2").problems(model(**keys), 2, "parallel.tensor"))


def test_a_width_alone_gives_the_sizes_of_the_published_model() -> None:
    found = model()
    assert (found.heads, found.kv_heads, found.intermediate) == (12, 12, 3072)
    assert (found.max_seq_len, found.tie_embeddings) == (1024, True)
    specs = layer_specs(
        found,
        tensor=1,
        sequence_parallel=False,
        seq_len=1024,
        micro_batch=1,
        precision="fp32",
        recompute="none",
    )
    rows = [row for layer in specs for row in layer.parameters[0] if not row.tied_use]
    assert sum(row.elements for row in rows) == 124_439_808
    assert problems() == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kv_heads": 4}, "model.kv_heads = 4: with model.family = 'gpt2' each of the 12 heads"),
        ({"rope_theta": 5e5}, "model.rope_theta = 500000.0: model.family = 'gpt2' learns its pos"),
        ({"head_dim": 128, "heads": 12}, "model.head_dim = 128: with model.family = 'gpt2' it is"),
        ({"hidden": 100, "heads": 12}, "model.hidden = 100 is not divisible by model.heads = 12"),
        ({"max_seq_len": 1}, "parallel.tensor = 2 exceeds model.max_seq_len = 1"),
        ({"heads": 3}, "model.heads = 3 is not divisible by parallel.tensor = 2"),
    ],
)
def test_what_it_has_not_is_refused_by_name(keys: dict[str, Any], said: str) -> None:
    [problem] = problems(**keys)
    assert problem.startswith(said)


def test_scaled_rotary_embedding_and_another_activation_are_refused() -> None:
    table = {"family": "gpt2", "layers": 2, "hidden": 64}
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    [problem] = problems_of(convert_config({"model": table | scaled}))
    assert "model.rope_scaling = " in problem
    assert "remove it" in problem
    with pytest.raises(ConfigError, match=r"model\.activation = 'relu'.*'gelu_new'"):
        convert_config({"model": table | {"activation": "relu"}})
    with pytest.raises(ConfigError, match=r"model\.sliding_window is not a key"):
        convert_config({"model": table | {"sliding_window": 4}})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_keeps_as_many_bytes_as_its_plan_says(precision: str) -> None:
    sizes = {"seq_len": 256, "micro_batch": 2}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    def kept(layers: int) -> int:
        """The bytes that autograd keeps of a forward pass, parameters left out."""
        found = GPT2Config(family="gpt2", layers=layers, hidden=256, heads=4, vocab=320)
        chunk = build_whole_model(found, dtype=dtype, device=torch.device("cpu"), seed=1, **sizes)
        own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
        seen: dict[int, int] = {}

        def note(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return value

        tokens = torch.zeros(2, 257, dtype=torch.int64)
        context = MicroBatchContext(0, 0, True, Batch(tokens[:, :-1], tokens[:, 1:]))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            loss = chunk(None, context)
        assert loss.requires_grad
        return sum(size for place, size in seen.items() if place not in own)

    specs = layer_specs(
        GPT2Config(family="gpt2", layers=1, hidden=256, heads=4, vocab=320),
        tensor=1,
        sequence_parallel=False,
        precision=precision,
        recompute="none",
        **sizes,
    )
    assert kept(2) - kept(1) == pytest.approx(specs[1].activation_bytes, rel=0.01)
