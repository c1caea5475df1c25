"""Experts: their choice, the ways of tokens, their products, the router's losses.

The oracle is the definition in plain PyTorch with autograd, token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.parallel.expert_parallel import (
    Router,
    add_loss,
    balance_loss,
    dispatch,
    expert_products,
    logits_of,
)
from holdfast.parallel.expert_parallel.products import Work, places_of, row_multiple
from holdfast.parallel.layout import GradientMark
from holdfast.parallel.optimizer.rules.rule import BlockUpdate, balance_blocks
from holdfast.parallel.pipeline import ExpertTeam, WeightGradientQueue

HIDDEN, WIDE = 12, 10
MICRO_BATCH, SLICE = 5, 3


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Recorder:
    """A sink that keeps what is added."""

    def __init__(self) -> None:
        self.found: list[tuple[nn.Parameter, Tensor, int]] = []

    def add(self, parameter: nn.Parameter, gradient: Tensor, unit: int = 0) -> None:
        self.found.append((parameter, gradient, unit))

    def add_matmul(
        self,
        parameter: nn.Parameter,
        grad_output: Iterable[Tensor],
        value: Tensor,
        marks: Sequence[GradientMark],
    ) -> None:
        (mark,) = marks
        assert mark.micro_batch == MICRO_BATCH
        assert mark.tokens == len(value)
        self.add(parameter, torch.cat(list(grad_output), 1).t() @ value, mark.unit)

    add_rows: Any = None
    pass_over: Any = None


def matrices(experts: int) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    gate_up = [nn.Parameter(normal(2 * WIDE, HIDDEN, seed=10 + e)) for e in range(experts)]
    down = [nn.Parameter(normal(HIDDEN, WIDE, seed=50 + e)) for e in range(experts)]
    return gate_up, down


def by_expert(parameters: Any, first: int = 0) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    return dict(enumerate(zip(*parameters, strict=True), first))


def ours(value: Tensor, experts: Tensor, weights: Tensor, parameters: Any, queue: Any) -> Tensor:
    team = ExpertTeam.of_parts(None, 0, len(parameters[1]), 1)
    way = dispatch(
        [experts], [(MICRO_BATCH, SLICE)], experts.shape[1], len(parameters[1]), team, 0, value
    )
    rows = way.to_experts(value).rows()
    return way.to_tokens(expert_products(rows, way.work, by_expert(parameters), queue), weights)


def plainly(value: Tensor, experts: Tensor, weights: Tensor, parameters: Any) -> Tensor:
    gate_up, down = parameters
    rows = []
    for token, (chosen, of_token) in enumerate(zip(experts, weights, strict=True)):
        total = torch.zeros(HIDDEN, dtype=value.dtype)
        for expert, weight in zip(chosen.tolist(), of_token, strict=True):
            gate, up = (gate_up[expert] @ value[token]).chunk(2)
            total = total + weight * (down[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


CHOICES = {
    "even": lambda tokens, experts: normal(tokens, experts).topk(2).indices,
    "one expert takes all": lambda tokens, experts: torch.tensor([[3, 0]] * tokens),
    "one has none": lambda tokens, experts: normal(tokens, experts - 1).topk(2).indices,
}


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "autograd"])
def test_experts_equal_the_definition(kind: str, sink: bool) -> None:
    tokens, experts = 21, 5
    chosen = CHOICES[kind](tokens, experts)
    results = []
    for function in ("ours", "plain"):
        value = normal(tokens, HIDDEN).requires_grad_()
        weights = normal(tokens, 2, seed=4).requires_grad_()
        parameters = matrices(experts)
        queue, recorder = WeightGradientQueue(), Recorder()
        if function == "ours":
            if sink:
                queue.subscribe(recorder)
            found = ours(value, chosen, weights, parameters, queue)
        else:
            found = plainly(value, chosen, weights, parameters)
        (found * normal(tokens, HIDDEN, seed=9)).sum().backward()
        of_parameters: list[Tensor | None] = [p.grad for p in (*parameters[0], *parameters[1])]
        if function == "ours" and sink:
            assert [unit for *_, unit in recorder.found] == [SLICE] * 2 * experts
            by_parameter = {parameter: gradient for parameter, gradient, _ in recorder.found}
            of_parameters = [by_parameter[p] for p in (*parameters[0], *parameters[1])]
        results.append((found, value.grad, weights.grad, of_parameters))
    for mine, plain in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-11)
    for mine, plain in zip(results[0][3], results[1][3], strict=True):
        assert mine is not None  # an expert without tokens has a gradient too
        expected = torch.zeros_like(mine) if plain is None else plain
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_experts_bits_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """A rank with half of the experts has the bits of one with all."""
    gate_up, down = ([p.to(dtype) for p in part] for part in matrices(6))
    parameters = [[nn.Parameter(p) for p in part] for part in (gate_up, down)]
    counts = [5, 0, 17, 1, 9, 3]
    multiple = row_multiple(dtype)
    places = places_of(counts, multiple)
    tokens = [normal(count, HIDDEN, seed=70 + e).to(dtype) for e, count in enumerate(counts)]

    def of(first: int, last: int) -> list[Tensor]:
        own = places_of(counts[first:last], multiple)
        rows = torch.full((own[-1], HIDDEN), float("nan"), dtype=dtype)
        for place, expert in zip(own, range(first, last), strict=False):
            rows[place : place + counts[expert]] = tokens[expert]
        rows.requires_grad_()
        recorder, queue = Recorder(), WeightGradientQueue()
        queue.subscribe(recorder)
        half = [part[first:last] for part in parameters]
        marks = [(GradientMark(count, SLICE, MICRO_BATCH),) for count in counts]
        work = [Work(e, marks[e]) for e in range(first, last)]
        found = expert_products(rows, work, by_expert(half, first), queue)
        gradient = torch.full_like(found, float("nan"))
        for place, expert in zip(own, range(first, last), strict=False):
            gradient[place : place + counts[expert]] = tokens[expert]
        found.backward(gradient)
        assert rows.grad is not None
        kept = [
            part[place : place + counts[expert]]
            for part in (found.detach(), rows.grad)
            for place, expert in zip(own, range(first, last), strict=False)
        ]
        by_parameter = {parameter: g for parameter, g, _ in recorder.found}
        return kept + [by_parameter[p] for part in half for p in part]

    whole, halves = of(0, 6), [of(0, 3), of(3, 6)]
    assert places[1] - places[0] == multiple
    for kind in range(4):  # outputs, input gradients, weight gradients
        for expert in range(6):
            alone = halves[expert // 3][kind * 3 + expert % 3]
            assert not alone.isnan().any()  # rows between experts are never read
            assert torch.equal(whole[kind * 6 + expert], alone)


def test_equal_scores_choose_the_lowest_experts() -> None:
    choices = Router(3).choose(torch.zeros(4, 8))
    assert choices.experts.tolist() == [[0, 1, 2]] * 4
    scores = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]])
    assert Router(2).choose(scores).experts.tolist() == [[1, 2]]


def test_groups_and_bias_choose_as_in_deepseek_v3() -> None:
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    settings = DeepseekV3Config(
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        hidden_size=HIDDEN,
    )
    theirs: Any = DeepseekV3TopkRouter(settings)
    theirs.weight.data = normal(16, HIDDEN, dtype=torch.float32)
    theirs.e_score_correction_bias.data = 0.1 * normal(16, seed=6, dtype=torch.float32)
    value = normal(50, HIDDEN, seed=2, dtype=torch.float32)
    logits, weights, experts = theirs(value)
    router = Router(4, "sigmoid", scale=2.5, groups=4, group_limit=2)
    found = router.choose(logits_of(value, theirs.weight), theirs.e_score_correction_bias)
    assert torch.equal(logits_of(value, theirs.weight), logits)
    mine, yours = found.experts.sort(-1), experts.sort(-1)
    assert torch.equal(mine.values, yours.values)
    torch.testing.assert_close(
        found.weights.gather(1, mine.indices), weights.gather(1, yours.indices)
    )


def test_kept_choices_are_taken_again_and_their_weights_follow_the_logits() -> None:
    router, logits = Router(2), normal(6, 5)
    kept = torch.tensor([[4, 0]] * 6)
    found = router.choose(logits, kept=kept)
    assert torch.equal(found.experts, kept)
    shares = torch.softmax(logits, -1)[:, [4, 0]]
    torch.testing.assert_close(found.weights, shares / shares.sum(-1, keepdim=True))


def test_a_sigmoid_router_does_not_gain_by_vanishing_scores() -> None:
    """All scores near zero: weights and gradients are finite, and sum to 1 at most."""
    logits = torch.full((3, 4), -200.0, dtype=torch.float32).requires_grad_()
    found = Router(2, "sigmoid").choose(logits)
    assert bool((found.weights.sum(-1) <= 1 + 1e-6).all())
    found.weights.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_the_balance_loss_is_transformers_for_one_sequence() -> None:
    """Of one sequence it is `load_balancing_loss_func`, times the tokens, over the choices."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    tokens, experts, per_token = 30, 6, 2
    logits = normal(tokens, experts).requires_grad_()
    choices = Router(per_token).choose(logits)
    counts = torch.bincount(choices.experts.flatten(), minlength=experts)[None]
    rows = torch.zeros(tokens, dtype=torch.int64)
    found = balance_loss(choices, counts, rows, torch.tensor([tokens]))
    theirs = load_balancing_loss_func((logits,), experts, per_token)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close((found / tokens).float(), theirs / per_token)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_a_sequence_give_the_whole_balance_loss(parts: int) -> None:
    """The published fault is a loss that grows with the ranks: here counts are of all of them."""
    logits = normal(40, 6).requires_grad_()
    rows = torch.arange(2).repeat(20)
    whole = Router(2).choose(logits)
    places = (rows[:, None] * 6 + whole.experts).flatten()
    counts = torch.bincount(places, minlength=12).view(2, 6)
    tokens = torch.tensor([20, 20])
    total = torch.zeros((), dtype=torch.float64)
    for part, of_rows in zip(logits.chunk(parts), rows.chunk(parts), strict=True):
        total = total + balance_loss(Router(2).choose(part), counts, of_rows, tokens)
    total.backward()
    gradient = logits.grad
    logits.grad = None
    expected = balance_loss(Router(2).choose(logits), counts, rows, tokens)
    expected.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradient, logits.grad)


def test_an_added_loss_is_in_the_gradient_and_not_in_the_value() -> None:
    logits = normal(5, 4).requires_grad_()
    weights = torch.softmax(logits, -1)
    loss = logits.logsumexp(-1).square().sum()
    found = add_loss(weights, loss, 0.25)
    assert torch.equal(found, weights)
    (found * 3.0).sum().backward()
    mine = logits.grad
    logits.grad = None
    plain = (torch.softmax(logits, -1) * 3.0).sum() + 0.25 * logits.logsumexp(-1).square().sum()
    plain.backward()
    torch.testing.assert_close(mine, logits.grad)


def test_biases_even_the_loads_of_a_skewed_router() -> None:
    """As long as the scores stay, the largest load falls to the mean and stays there."""
    logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(4))
    logits += torch.linspace(-1.5, 1.5, 8)
    router = Router(2, "sigmoid")
    bias, largest = torch.zeros(8), []
    for _ in range(200):
        loads = torch.bincount(router.choose(logits, bias).experts.flatten(), minlength=8)
        largest.append(int(loads.max()))
        update = BlockUpdate(bias, loads.float() * 0.125, (), decays=False, balance=0.005)
        balance_blocks([update], torch.ones(()), 1.0, None)
    assert largest[0] > 2 * 128
    assert max(largest[-20:]) < 1.1 * 128


def test_biases_of_even_loads_stay() -> None:
    bias = torch.zeros(4)
    update = BlockUpdate(bias, torch.full((4,), 7.0) * 0.3, (), decays=False, balance=0.5)
    balance_blocks([update], torch.ones(()), 1.0, None)
    assert bias.tolist() == [0.0] * 4
