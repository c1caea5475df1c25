"""Scores token by token are those of the whole sequence; draws are functions of their keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from holdfast.launch.text.decoding import Decoder, Limits, continued
from holdfast.launch.text.sampling import Sampling, candidates, choose, draw
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.models import build_whole_model
from support.runs.small_runs import make_config

CPU = torch.device("cpu")
ROOM = 40


def model(seq_len: int = ROOM, **keys: Any) -> Any:
    section = make_config(model={"layers": 2, **keys}).model
    chunk = build_whole_model(
        section, dtype=torch.float64, device=CPU, seq_len=seq_len, micro_batch=1, seed=3
    )
    return chunk, section.kv_heads


def tokens(batch: int, count: int) -> Tensor:
    return torch.randint(67, (batch, count), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("keys", [{}, {"kv_heads": 4}, {"kv_heads": 1, "tie_embeddings": True}])
@pytest.mark.parametrize("parts", [(1,) * 9, (13, 1, 1), (37, 3), (8, 8, 5, 1)], ids=str)
def test_scores_are_those_of_the_whole_sequence(keys: dict[str, Any], parts: Sequence[int]) -> None:
    chunk, kv_heads = model(**keys)
    text = tokens(2, sum(parts))
    whole = chunk.logits(text)
    decoder = Decoder(chunk, 2, ROOM, kv_heads, CPU)
    for part in text.split(parts, dim=1):
        scores = decoder.extend(part)
        expected = whole[:, decoder.length - 1].detach()
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no room"):
        decoder.extend(tokens(2, ROOM))


def greedy(chunk: Any, prompt: Sequence[int], count: int) -> list[int]:
    """By computing everything again for each token."""
    found = list(prompt)
    for _ in range(count):
        found.append(int(chunk.logits(torch.tensor([found]))[0, -1].argmax()))
    return found[len(prompt) :]


def test_the_best_token_is_taken_until_the_text_ends() -> None:
    chunk, kv_heads = model()
    prompt = tokens(1, 5)[0].tolist()
    expected = greedy(chunk, prompt, 12)

    def run(**limits: Any) -> Any:
        given: Any = {"tokens": 12, "context": ROOM, "ends": frozenset(), "vocab": 67, **limits}
        [found] = continued(chunk, kv_heads, CPU, prompt, [0], Sampling(), Limits(**given))
        return found.tokens, found.end

    assert run() == (expected, "tokens")
    assert run(context=9) == (expected[:4], "context")
    last = expected[7]
    first = expected.index(last)
    assert run(ends=frozenset({last})) == (expected[:first], "text")
    found, _ = run(vocab=20)
    assert max(found) < 20, "tokens that the tokenizer lacks are not chosen"


def test_a_sample_is_the_same_whichever_others_are_computed() -> None:
    chunk, kv_heads = model()
    heard = []
    limits = Limits(10, ROOM, frozenset({11}), 67)

    def run(samples: Sequence[int], seed: int = 5) -> list[list[int]]:
        sampling = Sampling(temperature=3.0, top_k=40, top_p=0.9, seed=seed)
        found = continued(
            chunk,
            kv_heads,
            CPU,
            [1, 2, 3],
            samples,
            sampling,
            limits,
            lambda *one: heard.append(one),
        )
        return [one.tokens for one in found]

    together = run(range(6))
    assert heard
    assert {n: [t for s, t in heard if s == n] for n in range(6)} == dict(enumerate(together))
    assert len(set(map(tuple, together))) == 6
    assert run([4, 2]) == [together[4], together[2]]
    assert run(range(6), seed=6) != together


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.5, 10, 0.6), (2.0, 1, 0.3), (1.0, 0, 1e-9)],
)
def test_candidates_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    steps: list[Any] = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs = scores[None]
    for step in steps:
        theirs = step(None, theirs)
    expected = theirs[0].softmax(0)
    found = torch.zeros(50, dtype=torch.float64)
    chosen, shares = candidates(scores, Sampling(temperature, top_k, top_p))
    found[chosen] = shares / shares.sum()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_draws_have_the_probabilities_of_the_model() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rule, count = Sampling(temperature=1.0, seed=9), 400
    found = Counter(choose(shares.log(), rule, sample=0, position=p) for p in range(count))
    for token, share in enumerate(shares.tolist()):
        assert abs(found[token] / count - share) < 4 * (share * (1 - share) / count) ** 0.5


@settings(max_examples=20)
@given(strategies.integers(0, 2**40), strategies.integers(0, 99), strategies.integers(0, 2**20))
def test_a_draw_is_a_function_of_its_key(seed: int, sample: int, position: int) -> None:
    first = draw(seed, sample, position)
    assert 0 <= float(first) < 1
    assert draw(seed, sample, position) == first
    others = [
        (seed + 1, sample, position),
        (seed, sample + 1, position),
        (seed, sample, position + 1),
    ]
    assert all(draw(*key) != first for key in others)


def test_of_equal_scores_the_lowest_token_is_the_best() -> None:
    scores = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert choose(scores, Sampling(), 0, 0) == 1
    assert choose(scores, Sampling(temperature=1.0, top_k=1), 0, 0) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"temperature": -1.0}, "--temperature = -1.0: allowed are numbers from 0 to"),
        ({"top_k": -1}, "--top-k = -1: allowed are whole numbers from 0 on"),
        ({"top_p": 0.0}, "--top-p = 0.0: allowed are over 0 to 1"),
        ({"top_p": float("nan")}, "--top-p = nan"),
    ],
)
def test_a_wrong_rule_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**keys)
    assert said in str(caught.value)
