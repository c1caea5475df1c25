"""Published faults of experts: the router's losses, padding, what is computed again."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from holdfast.parallel.expert_parallel import LOAD_UNIT, Router, balance_loss, dispatch
from holdfast.parallel.optimizer.rules.rule import BlockUpdate, balance_blocks
from holdfast.parallel.pipeline import Batch, Documents, MicroBatchContext
from holdfast.trainer.models import build_chunk, layer_specs
from holdfast.trainer.models.decoder import experts as layer_experts
from support.oracles.transformers_models import (
    DEEPSEEK,
    by_name,
    context_of,
    gradient_of,
    our_model,
    small_model,
    tokens_of,
)

KEYS: dict[str, Any] = {
    "family": "qwen3_moe",
    "experts": 8,
    "expert_intermediate": 12,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.1,
}


def gradients(contexts: list[MicroBatchContext], chunk: Any = None) -> dict[str, Tensor]:
    chunk = chunk or our_model(small_model(**KEYS), torch.float64)
    for context in contexts:
        chunk(None, context).sum().backward()
    return by_name(chunk, gradient_of)


@pytest.mark.parametrize("sequences", [1, 2])
def test_the_routers_losses_do_not_depend_on_the_cut_into_micro_batches(sequences: int) -> None:
    tokens = tokens_of(small_model(**KEYS), 4, 25)
    whole = gradients([context_of(tokens)])
    parts = gradients([context_of(part) for part in tokens.split(sequences)])
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-11)
    without = small_model(**{**KEYS, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0})
    plain = gradients([context_of(tokens)], our_model(without, torch.float64))
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(plain[router], whole[router], rtol=1e-3)


def test_the_routers_losses_have_their_share_of_the_gradient() -> None:
    """By finite differences of loss + coefficients times their means per token, per sequence."""
    model = small_model(**KEYS, layers=1)
    tokens = tokens_of(model, 2, 25)
    chunk = our_model(model, torch.float64)
    router = next(p for (*_, spec), p in chunk.rows() if spec.name.endswith("mlp.gate.weight"))
    found: list[Any] = []
    choose = Router.choose

    def keeping(self: Router, *given: Any, **others: Any) -> Any:
        found.append(choose(self, *given, **others))
        return found[-1]

    def objective() -> float:
        found.clear()
        with mock.patch.object(Router, "choose", keeping), torch.no_grad():
            total = chunk(None, context_of(tokens)).item()
        (choices,) = found
        total += 0.1 * choices.logsumexp.square().sum().item()
        for row in range(2):
            shares, experts = choices.shares[row::2], choices.experts[row::2]
            counts = torch.bincount(experts.flatten(), minlength=8).double()
            total += 0.5 * 8 / 2 * ((counts / 24) @ shares.mean(0)).item() * 24
        return total

    chunk(None, context_of(tokens)).backward()
    assert router.grad is not None
    for place in ((0, 0), (5, 17)):
        values = []
        for step in (1e-6, -1e-6):
            router.data[place] += step
            values.append(objective())
            router.data[place] -= step
        slope = (values[0] - values[1]) / 2e-6
        assert router.grad[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "keys", [KEYS, {**DEEPSEEK, "router_aux_loss_coef": 0.5}], ids=["losses", "biases"]
)
def test_padding_changes_neither_counts_nor_losses(keys: dict[str, Any]) -> None:
    model = small_model(**keys)
    tokens = tokens_of(model, 2, 24)
    targets = tokens.roll(-1, 1)
    targets[:, 14:] = -1  # the second document of each sequence is padding
    documents = Documents.of([15, 9, 15, 9], 2)
    found = []
    for padding in (0, 5):
        tokens[:, 15:] = padding
        batch = Batch(tokens, targets, documents)
        assert batch.learned().sum(1).tolist() == [15, 15]
        context = MicroBatchContext(0, 0, True, batch)
        found.append(gradients([context], our_model(model, torch.float64)))
    embedding = "model.embed_tokens.weight"
    for name, gradient in found[0].items():
        if name != embedding:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1][embedding], found[0][embedding], rtol=1e-12, atol=1e-12)


def test_the_routers_loss_counts_what_is_dispatched() -> None:
    """With groups and biases, which choose others than the best scores."""
    model: Any = small_model(**{**DEEPSEEK, "router_aux_loss_coef": 0.5})
    chunk = our_model(model, torch.float64)
    for (*_, spec), parameter in chunk.rows():
        if spec.name.endswith("e_score_correction_bias"):
            parameter.data = torch.linspace(-2.0, 2.0, model.experts, dtype=torch.float64)
    sent: list[Tensor] = []
    counted: list[Tensor] = []

    def sending(chosen: list[Tensor], *others: Any) -> Any:
        sent.append(torch.bincount(chosen[0].flatten(), minlength=model.experts))
        return dispatch(chosen, *others)

    def counting(choices: Any, counts: Tensor, *others: Any) -> Tensor:
        best = choices.shares.topk(model.experts_per_token).indices
        assert not torch.equal(best.sort().values, choices.experts.sort().values)
        counted.append(counts.sum(0))
        return balance_loss(choices, counts, *others)

    with (
        mock.patch.object(layer_experts, "dispatch", sending),
        mock.patch.object(layer_experts, "balance_loss", counting),
    ):
        chunk(None, context_of(tokens_of(model, 2, 25)))
    assert len(sent) == model.layers - len(model.dense_layers)
    assert [counts.tolist() for counts in counted] == [counts.tolist() for counts in sent]


class _Sink:
    """A sink that keeps the gradients of biases."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def add(self, parameter: Any, gradient: Tensor, unit: int = 0) -> None:
        if parameter.dim() == 1:
            self.found.append(gradient)

    def add_matmul(self, *_: Any) -> None: ...
    def add_rows(self, *_: Any) -> None: ...


def test_loads_of_seventy_thousand_tokens_that_differ_by_one_are_no_equal_ones() -> None:
    """In 16 bits 35,001 and 35,000 are the same number, and the bias would stay."""
    alone = {"experts": 2, "experts_per_token": 1, "expert_groups": 1, "groups_per_token": 1}
    model = small_model(**{**DEEPSEEK, **alone, "layers": 1, "dense_layers": [], "hidden": 4})
    chunk = our_model(model, torch.bfloat16)
    (layer,) = (m for m in chunk.modules() if isinstance(m, layer_experts.Experts))
    sink, value = _Sink(), torch.randn(70_001, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    chunk.queue.subscribe(sink)

    def in_turn(_: Router, scores: Tensor, bias: Tensor | None) -> Tensor:
        return (torch.arange(len(scores)) % 2)[:, None]

    with mock.patch.object(Router, "_best", in_turn):
        context = MicroBatchContext(0, 0, True, None)
        layer([value], context, [[chunk.queue]], {})[0].sum().backward()
    (loads,) = sink.found
    assert (loads.double() / LOAD_UNIT).tolist() == [35_001, 35_000]
    bias = torch.zeros(2)
    balance_blocks(
        [BlockUpdate(bias, loads.float(), (), decays=False, balance=0.5)], torch.ones(()), 1.0, None
    )
    assert bias.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_what_is_computed_again_takes_the_same_experts(recompute: str) -> None:
    """A router that would choose others the second time, as near ties do, changes nothing."""
    model = small_model(**KEYS)
    specs = layer_specs(
        model,
        tensor=1,
        sequence_parallel=False,
        seq_len=24,
        micro_batch=2,
        precision="fp64",
        recompute=recompute,
    )
    chunk = build_chunk(
        model,
        range(len(specs)),
        specs,
        dtype=torch.float64,
        device=torch.device("cpu"),
        seq_len=24,
        seed=7,
    )
    best, calls = Router._best, list[int]()

    def forgetful(self: Router, scores: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(len(calls))
        found = best(self, scores, bias)
        return found if len(calls) <= model.layers else (found + 1) % 8

    with mock.patch.object(Router, "_best", forgetful):
        found = gradients([context_of(tokens_of(model, 2, 25))], chunk)
    assert len(calls) == model.layers
    expected = gradients([context_of(tokens_of(model, 2, 25))], _plain(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def _plain(model: Any) -> Any:
    from holdfast.trainer.models import build_whole_model

    return build_whole_model(
        model,
        dtype=torch.float64,
        device=torch.device("cpu"),
        seq_len=24,
        micro_batch=2,
        seed=7,
    )
