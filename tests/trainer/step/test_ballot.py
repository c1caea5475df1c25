"""The vote's tensor: every field has its slot, and what is read is what was packed."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from holdfast.parallel.optimizer import NONFINITE, OUT_OF_RANGE
from holdfast.trainer.step.vote.ballot import FLAGS, MARKS, REQUESTS, BallotFormat, loss_slots
from holdfast.trainer.step.vote.progress import NO_REQUESTS, Requests

FORMAT = BallotFormat(squares=3, losses=2)


def packed(rank: int, flags: int = 0, requests: Requests = NO_REQUESTS) -> torch.Tensor:
    """The ballot of one of two ranks: rank 0 owns two blocks, and each reports one loss."""
    squares = torch.tensor([[1.0, 0.0, 8.0], [0.0, 16.0, 0.0]][rank], dtype=torch.float64)
    return FORMAT.pack(
        squares, loss_slots({(rank, 0): torch.tensor(2.0 + rank)}, 2, 1), flags, requests
    )


def test_the_order_on_the_wire_stands() -> None:
    ballot = packed(0, OUT_OF_RANGE, Requests(stop=True, leave=True))
    assert ballot.dtype == torch.float64
    assert ballot.tolist() == [1, 0, 8, 2, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0]
    flags = ("nonfinite", "out_of_range")
    requests = ("save", "stop", "interrupt", "busy", "change", "filling", "leave", "rewind")
    assert (*flags, *requests) == MARKS


def test_every_request_has_a_slot() -> None:
    assert set(REQUESTS) == {field.name for field in fields(Requests)}
    assert len(set(MARKS)) == len(FLAGS) + len(REQUESTS)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_of_one_rank_is_read_by_all_under_its_name(name: str) -> None:
    outcome = FORMAT.outcome(packed(0) + packed(1, requests=Requests(**{name: True})), tokens=10)
    assert outcome.requests == Requests(**{name: True})
    assert outcome.leaving_ranks == (name == "leave")
    assert outcome.usable


def test_norm_and_loss_are_those_of_all_ranks() -> None:
    outcome = FORMAT.outcome(packed(0) + packed(1), tokens=10)
    assert (outcome.loss, outcome.grad_norm) == ((2.0 + 3.0) / 10, 5.0)
    assert outcome.requests == NO_REQUESTS


@pytest.mark.parametrize("flag", [NONFINITE, OUT_OF_RANGE])
def test_ranks_that_saw_a_flag_are_counted(flag: int) -> None:
    outcome = FORMAT.outcome(packed(0, flag) + packed(1, flag), tokens=10)
    found = (outcome.nonfinite_ranks, outcome.out_of_range_ranks)
    assert found == ((2, 0) if flag == NONFINITE else (0, 2))
    assert math.isnan(outcome.grad_norm) == (flag == NONFINITE)
    assert not outcome.usable


def test_a_square_that_overflows_is_no_norm() -> None:
    ballot = packed(0) + packed(1)
    ballot[1] = float("inf")
    assert math.isnan(FORMAT.outcome(ballot, tokens=10).grad_norm)
