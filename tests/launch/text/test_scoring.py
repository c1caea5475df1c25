"""Every token of a text counts in one window, with the context that the stride leaves it."""

from __future__ import annotations

import math

from hypothesis import given, strategies

from holdfast.launch.text.scoring import Score, windows


@given(strategies.integers(0, 200), strategies.integers(1, 40), strategies.data())
def test_each_token_but_the_first_counts_once(
    count: int, context: int, data: strategies.DataObject
) -> None:
    stride = data.draw(strategies.integers(1, context))
    counted: list[int] = []
    for window in windows(count, context, stride):
        assert window.begin < window.first <= window.last
        assert window.last - window.begin <= context
        for place in range(window.first, window.last + 1):
            assert place - window.begin >= min(place, context - stride + 1)
        counted += range(window.first, window.last + 1)
    assert counted == list(range(1, count))


def test_a_score_says_what_a_byte_costs() -> None:
    score = Score("text", loss=2.0, tokens=30, bytes=120)
    assert score.perplexity == math.exp(2)
    assert score.bits_per_byte == 0.5 / math.log(2)
    assert score.as_dict()["perplexity_per_byte"] == math.exp(0.5)
    unknown = Score("tokens", loss=800.0, tokens=1, bytes=None)
    assert unknown.bits_per_byte is unknown.as_dict()["perplexity_per_byte"] is None
    assert unknown.perplexity == math.inf
