"""Every family against transformers: logits, the loss and all gradients, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.trainer.models import family_of
from support.oracles.transformers_models import (
    MODELS,
    by_name,
    context_of,
    fused,
    gradient_of,
    our_model,
    small_model,
    their_model,
    tokens_of,
    value_of,
)


@pytest.mark.slow
@pytest.mark.parametrize("keys", MODELS, ids=str)
def test_logits_and_gradients_equal_transformers(keys: dict[str, Any]) -> None:
    if "experts" in keys:
        keys = keys | {"router_aux_loss_coef": 0.0}
    model = small_model(**keys)
    chunk = our_model(model, torch.float64)
    theirs = their_model(model, by_name(chunk, value_of), torch.float64)
    tokens = tokens_of(model, 2, 24)
    logits = theirs(tokens[:, :-1]).logits
    # Rotary tables and RMSNorm are float32 in transformers; GPT-2 has neither.
    close = 1e-10 if model.family == "gpt2" else 1e-5
    torch.testing.assert_close(chunk.logits(tokens[:, :-1]), logits, rtol=0, atol=close)
    loss = chunk(None, context_of(tokens))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=min(close, 1e-7))
    loss.backward()
    expected.backward()
    found = fused(by_name(chunk, gradient_of))
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=close, atol=close)


@pytest.mark.parametrize("keys", MODELS, ids=str)
def test_config_json_gives_the_section_back(keys: dict[str, Any]) -> None:
    model = small_model(**keys)
    family = family_of(model.family)
    described = family.config_json(model, 16, "float32")
    assert family.section_of is not None
    for key, value in family.section_of(described).items():
        mine = model.dim_per_head if key == "head_dim" else getattr(model, key)
        assert value == mine, key
    assert list(family.differences(model, described)) == []
