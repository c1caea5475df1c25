"""What each rank of a shard group keeps: every element once in a group, alike on all ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from holdfast.parallel.optimizer.parameter_buffer import ParameterBuffer
from holdfast.parallel.optimizer.sharding.shares import kept_spans, layer_shares
from holdfast.parallel.optimizer.spans import KeptSpans, Span
from holdfast.parallel.plan import (
    KeptKind,
    Plan,
    Roster,
    are_aligned,
    contribution_order,
    is_apart,
    keepers,
    replan,
    shard_group,
    training_program,
    use_order,
)
from holdfast.parallel.schedules import Op
from support.runs.exchange_plans import NODES, after_a_loss, buffer_of, plan_of

KINDS: tuple[KeptKind, ...] = ("gradients", "parameters")
PLANS = pytest.mark.parametrize(
    ("layout", "tied", "lost"),
    [
        (layout, tied, lost)
        for layout in (
            "shared in groups",
            "shared",
            "shared over stages",
            "shared beside copied heads",
            "data",
        )
        for tied in (False, True)
        for lost in (False, True)
    ],
)


def made(layout: str, tied: bool, lost: bool) -> Plan:
    plan = plan_of(layout, tied=tied)
    return after_a_loss(plan) if lost else plan


def placed(plan: Plan) -> list[int]:
    return [rank for rank in plan.stage_replicas.ranks if plan.stage_replicas.find(rank)]


@PLANS
@pytest.mark.parametrize("kept", KINDS)
def test_each_group_keeps_every_element_once(
    layout: str, tied: bool, lost: bool, kept: KeptKind
) -> None:
    plan = made(layout, tied, lost)
    buffers = {rank: buffer_of(plan, rank) for rank in placed(plan)}
    for rank, buffer in buffers.items():
        members = shard_group(plan, rank, kept).ranks
        assert rank in members
        times: Counter[int] = Counter()
        for member in members:
            spans = kept_spans(plan, member, kept)(buffers[member].segments).spans
            times.update(place for span in spans for place in range(span.start, span.stop))
        held = {
            place: len(members) if whole else 1
            for segment in buffer.segments
            for whole in [kept == "gradients" and len(segment.spec.copies) > 1]
            for place in range(segment.offset, segment.offset + segment.spec.elements)
        }
        assert times == held


@PLANS
@pytest.mark.parametrize("kept", KINDS)
def test_the_ranks_of_a_group_know_each_other_s_shares(
    layout: str, tied: bool, lost: bool, kept: KeptKind
) -> None:
    plan = made(layout, tied, lost)
    for rank in placed(plan):
        mine = layer_shares(plan, rank, buffer_of(plan, rank), kept)
        for member in shard_group(plan, rank, kept).ranks:
            buffer = buffer_of(plan, member)
            theirs = layer_shares(plan, member, buffer, kept)
            assert {x: s.shares for x, s in theirs.items()} == {
                x: s.shares for x, s in mine.items()
            }
            here = kept_spans(plan, member, kept)(buffer.segments)
            for share in theirs.values():
                for span in share.shares.get(member, ()):
                    assert here.has(span.start, span.stop)


@PLANS
def test_each_gradient_of_a_shared_parameter_is_taken_once(
    layout: str, tied: bool, lost: bool
) -> None:
    """Rows of keys that other parts have too stand beside a part's own rows of queries."""
    plan = made(layout, tied, lost)
    for rank in placed(plan):
        buffer = buffer_of(plan, rank)
        members = shard_group(plan, rank, "gradients").ranks
        for shares in layer_shares(plan, rank, buffer, "gradients").values():
            spans = [span for keeper in members for span in shares.taken(keeper, rank)]
            times = Counter(place for span in spans for place in range(span.start, span.stop))
            places = [buffer.place(parameter) for parameter in shares.parameters]
            assert times == Counter(place for a, b in places for place in range(a, b))


@pytest.mark.parametrize("lost", [False, True])
def test_an_owner_keeps_its_blocks_and_groups_are_as_even_as_owners(lost: bool) -> None:
    plan = made("shared in groups", False, lost)
    loads: Counter[int] = Counter()
    for block in plan.blocks[0]:
        found = keepers(plan, block, "gradients")
        assert plan.owners[0][block.index] in found
        assert not is_apart(plan, block, "gradients")
        assert len(found) == (1 if lost else 2)  # three ranks are one group: smaller ones keep more
        for keeper in found:
            loads[keeper] += block.elements
    largest = max(block.elements for block in plan.blocks[0])
    assert max(loads.values()) - min(loads.values()) <= 4 * largest


def test_groups_that_are_left_hold_what_they_held_at_least() -> None:
    plan = plan_of("shared over stages", tied=False)
    sizes = []
    for gone in range(5):
        left = tuple(plan.stage_replicas.ranks[gone:])
        after = replan(plan, Roster(left, NODES), generation=1)
        sizes += [len(shard_group(after, rank, "gradients").ranks) for rank in placed(after)]
    assert min(sizes) >= 2


@pytest.mark.parametrize("layout", ["shared", "shared over stages"])
@pytest.mark.parametrize("only", [None, frozenset({0, 1, 4})])
def test_contributions_and_uses_follow_the_program(
    layout: str, only: frozenset[int] | None
) -> None:
    plan = plan_of(layout, tied=False)
    for rank in placed(plan):
        program = training_program(plan, rank, only)
        order = contribution_order(plan, rank, only)
        layers = [layer for chunk in plan.chunks_of(rank) for layer in plan.layers_of(chunk)]
        numbers = {action.micro_batch for action in program if action.op is Op.FORWARD}
        assert Counter(order) == Counter((m, layer) for m in numbers for layer in layers)
        uses = use_order(plan, program)
        assert all(a != b for a, b in pairwise(uses))
        assert set(uses) == set(layers if numbers else ())


def test_ranks_are_aligned_where_one_does_what_the_other_does() -> None:
    def aligned(only: frozenset[int] | None = None, **changes: Any) -> bool:
        plan = plan_of("shared over stages" if "pipeline" in changes else "data", tied=False)
        changes.pop("pipeline", None)
        plan = plan.evolved(**changes)
        return are_aligned(plan, shard_group(plan, 0, "gradients"), only)

    even = tuple((number,) for number in range(4))
    uneven = ((0, 1), (2, 3), (4,), (5,))
    shared: dict[str, Any] = {"shard": "gradients"}
    assert aligned(micro_batches=even, schedule="gpipe", **shared)
    assert aligned(micro_batches=uneven, schedule="1f1b", **shared)  # forward, backward, forward, …
    assert not aligned(micro_batches=uneven, schedule="gpipe", **shared)
    assert aligned(micro_batches=even, pipeline=2)
    assert not aligned(micro_batches=uneven, pipeline=2)
    assert aligned(frozenset({0, 2, 4, 5}), micro_batches=uneven, pipeline=2)
    assert aligned(frozenset({0, 2, 4, 5}), micro_batches=uneven, schedule="gpipe", **shared)
    assert not aligned(frozenset({0, 1, 2}), micro_batches=even, pipeline=2)
    assert not aligned(micro_batches=even, assignment=(even, even), pipeline=2)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), max_size=8), st.data())
def test_kept_spans_find_what_is_kept_and_refuse_what_is_not(
    gaps: list[tuple[int, int]], data: st.DataObject
) -> None:
    spans, end = [], 0
    for gap, length in gaps:
        spans.append(Span(end + gap, end + gap + length))
        end += gap + length
    kept = KeptSpans(spans)
    places = [place for span in spans for place in range(span.start, span.stop)]
    values = torch.tensor(places, dtype=torch.int64)
    assert kept.elements == len(places)
    start = data.draw(st.integers(0, end))
    stop = data.draw(st.integers(start + 1, end + 1))
    inside = set(range(start, stop)) <= set(places)
    assert kept.has(start, stop) == inside
    within = [place for span in kept.within(start, stop) for place in range(span.start, span.stop)]
    assert within == [place for place in places if start <= place < stop]
    if inside:
        assert kept.of(values, start, stop).tolist() == list(range(start, stop))
    else:
        with pytest.raises(ValueError, match="not kept"):
            kept.of(values, start, stop)


def test_a_buffer_of_a_share_has_no_memory_for_the_rest() -> None:
    plan = plan_of("shared in groups", tied=True)
    whole = buffer_of(plan, 0)
    rows = [(s.row, s.parameter) for s in whole.segments]
    part = ParameterBuffer(rows, keep=kept_spans(plan, 0, "parameters"))
    assert part.elements == whole.elements
    assert part.values.numel() <= 0.6 * whole.elements
    found = sum(values.numel() for _, _, values in part.kept_rows(part.kept, part.part))
    assert found == part.values.numel()
