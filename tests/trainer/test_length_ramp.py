"""Sequences that grow: steps have the losses of short sequences, in the bits of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.pipeline import Batch, Documents
from holdfast.trainer.config import RunConfig
from holdfast.trainer.config.loading import check_config
from holdfast.trainer.config.sections import LengthStage, TrainConfig
from support.oracles.transformers_models import (
    by_name,
    context_of,
    gradient_of,
    our_model,
    small_model,
    tokens_of,
)
from support.processes.cluster import Cluster
from support.runs.small_runs import make_config, run_training

TRAIN: dict[str, Any] = {
    "steps": 4,
    "seq_len": 32,
    "global_batch": 4,
    "context_chunks": 2,
    "length_ramp": [{"until": 1, "seq_len": 5}, {"until": 3, "seq_len": 16}],
}


def config_of(**sections: Any) -> RunConfig:
    return make_config(
        model={"layers": 4, "heads": 4, "kv_heads": 2},
        train={**TRAIN, **sections.pop("train", {})},
        **sections,
    )


def test_a_step_has_the_length_of_its_stage() -> None:
    stages = [LengthStage(until=2, seq_len=8), LengthStage(until=3, seq_len=16)]
    train = TrainConfig(seq_len=64, length_ramp=stages)
    assert [train.length_of(step) for step in range(5)] == [8, 8, 16, 64, 64]


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    rows=st.integers(1, 3),
    length=st.integers(1, 14),
)
def test_documents_are_cut_at_both_ends(lengths: list[int], rows: int, length: int) -> None:
    tokens = torch.zeros(rows, sum(lengths), dtype=torch.int64)
    cut = Batch(tokens, tokens, Documents.of(lengths * rows, rows)).cut(length)
    expected, starts = [], {sum(lengths[:place]) for place in range(len(lengths))}
    for place in range(sum(lengths)):
        begins = place in starts or place % length == 0
        expected.append(0 if begins else expected[-1] + 1)
    assert cut.documents is not None
    assert cut.documents.positions.t().tolist() == [expected] * rows


def test_a_cut_batch_has_the_loss_of_short_sequences() -> None:
    """And their gradients, in float64."""
    model = small_model(family="llama")
    tokens = tokens_of(model, 2, 25)
    cut, short = (our_model(model, torch.float64) for _ in range(2))
    context = context_of(tokens)
    assert context.batch is not None
    loss = cut(None, context.__class__(0, 0, True, context.batch.cut(8)))
    inputs, targets = (part.reshape(6, 8) for part in (tokens[:, :-1], tokens[:, 1:]))
    expected = short(None, context.__class__(0, 0, True, Batch(inputs, targets)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    expected.backward()
    theirs = by_name(short, gradient_of)
    for name, gradient in by_name(cut, gradient_of).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-11)


@pytest.mark.mp
def test_layouts_give_the_bits_of_one_process(cluster: Cluster) -> None:
    """Also ranks in the middle of a pipeline know where sequences end."""
    alone = run_training(cluster, config_of())
    for layout in ({"pipeline": 4}, {"data": 2, "context": 2}):
        assert run_training(cluster, config_of(parallel=layout)) == alone, layout
    whole = run_training(cluster, config_of(train={"length_ramp": []}))
    assert set(alone["losses"]).isdisjoint(whole["losses"])


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        ([(3, 4), (3, 8)], "must be more than 3"),
        ([(3, 32)], "less than train.seq_len = 32"),
        ([(2, 8), (3, 8)], "must be more than 8"),
        ([(0, 4)], "until"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(ramp: list[tuple[int, int]], said: str) -> None:
    stages = [{"until": until, "seq_len": length} for until, length in ramp]
    with pytest.raises(ConfigError, match=said):
        check_config(config_of(train={"length_ramp": stages}))
