"""Flat values in pieces: what stays in a change of plan stays where it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from holdfast.parallel.layout import Box, Initial, ParameterSpec
from holdfast.parallel.optimizer.flat_values import FlatValues, Piece, pieces_of
from holdfast.parallel.optimizer.spans import KeptSpans, Span

ZEROS = partial(torch.zeros, dtype=torch.float32)
ROW = ParameterSpec(
    name="weight",
    shape=(4, 8),
    box=Box((0, 0), (4, 8)),
    local="weight",
    local_row=0,
    initial=Initial("constant", 0.0),
    decay=True,
    copies=(0,),
)


def laid_out(*experts: int | None, layer: int = 1) -> list[Piece]:
    """The pieces of one parameter of 32 elements for each expert, or of none."""
    return pieces_of(
        ((layer, expert, place if expert is None else 0), layer, replace(ROW, expert=expert), 32)
        for place, expert in enumerate(experts)
    )


def test_neighbours_of_one_expert_or_of_none_are_a_piece() -> None:
    spans = [piece.kept.spans for piece in laid_out(None, None, 3, 3, 5, None)]
    assert spans == [(Span(0, 64),), (Span(64, 128),), (Span(128, 160),), (Span(160, 192),)]


def test_experts_of_two_layers_are_two_pieces() -> None:
    parts = [(layer, layer, replace(ROW, expert=0), 32) for layer in (1, 2)]
    assert len(pieces_of(parts)) == 2


def test_pieces_that_stay_are_the_same_memory_and_others_are_new() -> None:
    before = FlatValues(laid_out(None, 1, 4), ZEROS)
    for number, values in enumerate(before.tensors):
        values.fill_(number + 1)
    after = FlatValues(laid_out(None, 0, 4, 6), ZEROS, before)
    dense, new, kept, last = after.tensors
    assert dense is before.tensors[0]
    assert kept is before.tensors[2]
    assert after.part(64, 96).tolist() == [3.0] * 32
    assert not new.any()
    assert not last.any()
    kept[0] = 7.0
    assert before.part(64, 96)[0] == 7.0


def test_a_part_of_two_pieces_is_refused() -> None:
    values = FlatValues(laid_out(None, 2), ZEROS)
    with pytest.raises(ValueError, match="elements 16 to 48 are not kept here"):
        values.part(16, 48)
    with pytest.raises(ValueError, match="not kept here"):
        FlatValues([], ZEROS).part(0, 1)
    with pytest.raises(ValueError, match="2 pieces"):
        values.one  # noqa: B018


def test_parts_of_spans_are_cut_where_pieces_end() -> None:
    values = FlatValues(laid_out(None, 2, 3), ZEROS)
    found = values.parts([Span(16, 48), Span(60, 68), Span(90, 96)])
    assert [part.numel() for part in found] == [16, 16, 4, 4, 6]
    assert found[1].data_ptr() == values.tensors[1].data_ptr()
    assert values.parts([]) == []
    with pytest.raises(ValueError, match="not kept here"):
        values.parts([Span(90, 97)])


def test_a_piece_with_gaps_gives_what_it_keeps() -> None:
    kept = KeptSpans([Span(8, 16), Span(32, 40)])
    values = FlatValues([Piece(None, kept)], lambda size: torch.arange(size))
    assert values.part(34, 36).tolist() == [10, 11]
    assert values.one.tolist() == list(range(16))
    with pytest.raises(ValueError, match="elements 16 to 20"):
        values.part(16, 20)
