"""The sizes of a model follow from its width, and from nothing that a layout changes."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.trainer.config import convert_config
from holdfast.trainer.models import family_of
from holdfast.trainer.models.llama.family import LlamaConfig


def model(hidden: int, **keys: Any) -> LlamaConfig:
    return LlamaConfig(family="llama", layers=2, hidden=hidden, vocab=320, **keys)


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "intermediate"),
    [
        (96, 6, 3, 224),  # the sizes of earlier versions, on which runs rely
        (64, 4, 2, 192),
        (128, 4, 2, 352),
        (256, 4, 2, 768),
        (768, 12, 6, 2048),
        (1024, 16, 8, 2816),
        (2048, 16, 8, 5632),
        (4096, 32, 8, 11008),
        (1000, 20, 5, 2816),
    ],
)
def test_unset_sizes_are_those_that_fit_the_width(
    hidden: int, heads: int, kv_heads: int, intermediate: int
) -> None:
    found = model(hidden)
    assert (found.heads, found.kv_heads, found.intermediate) == (heads, kv_heads, intermediate)
    assert found.dim_per_head * heads == hidden


def test_every_even_width_has_sizes_without_a_problem() -> None:
    for hidden in (*range(2, 700, 2), 1536, 2560, 3072, 5120, 8192, 2**20):
        found = model(hidden)
        assert list(family_of("llama").problems(found, 1, "parallel.tensor")) == [], found
    assert "needs an even one" in next(family_of("llama").problems(model(97), 1, "parallel.tensor"))


def test_sizes_that_are_set_stay_and_others_follow_them() -> None:
    assert (model(768, heads=8).heads, model(768, heads=8).kv_heads) == (8, 4)
    assert (model(768, head_dim=128).heads, model(768, kv_heads=1).kv_heads) == (6, 1)
    assert model(768, intermediate=100).intermediate == 100


def test_the_layout_does_not_change_the_model() -> None:
    plain = {"model": {"family": "llama", "layers": 8, "hidden": 768}}
    models = {
        convert_config({**plain, "parallel": {axis: size}}).model
        for axis in ("tensor", "pipeline", "data")
        for size in (1, 2, 8)
    }
    assert len(models) == 1
