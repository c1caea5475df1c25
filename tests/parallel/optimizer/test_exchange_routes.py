"""The routes of gradient sums and parameters: both ends of every message agree, whatever the plan,
and no order of events makes ranks wait in a circle.
"""

from __future__ import annotations

from collections import Counter

import pytest

from holdfast.parallel.optimizer.exchange.buckets import (
    Bucket,
    Routes,
    gathering,
    routes,
)
from holdfast.parallel.optimizer.sharding.shares import kept_spans
from holdfast.parallel.optimizer.spans import Span
from holdfast.parallel.plan import KeptKind, Plan
from holdfast.parallel.plan.cost import exchanged_bytes
from holdfast.parallel.precision import PRECISIONS
from support.runs.exchange_plans import LAYOUTS, after_a_loss, buffer_of, plan_of

ELEMENTS = 3000


def routes_of(plan: Plan, kept: KeptKind = "gradients") -> dict[int, Routes]:
    ranks = [rank for rank in plan.stage_replicas.ranks if plan.stage_replicas.find(rank)]
    return {rank: routes(plan, rank, buffer_of(plan, rank), ELEMENTS, kept) for rank in ranks}


PLANS = pytest.mark.parametrize(
    "plan",
    [
        pytest.param((layout, tied, lost), id=f"{layout}{'-tied' * tied}{'-lost' * lost}")
        for layout in LAYOUTS
        for tied in (False, True)
        for lost in (False, True)
        if not (lost and layout == "alone")
    ],
)


def made(plan: tuple[str, bool, bool]) -> Plan:
    layout, tied, lost = plan
    first = plan_of(layout, tied=tied)
    return after_a_loss(first) if lost else first


def elements(spans: tuple[Span, ...]) -> int:
    return sum(span.stop - span.start for span in spans)


@PLANS
def test_every_holder_sends_each_bucket_that_its_owner_awaits_and_no_other(
    plan: tuple[str, bool, bool],
) -> None:
    found = routes_of(made(plan))
    awaited = {
        (peer, owner, owned.bucket.row): tuple(block.index for block in owned.bucket.blocks)
        for owner, routes_here in found.items()
        for owned in routes_here.mine
        for peer in owned.contributors
    }
    sent = {
        (rank, bucket.owner, bucket.row): tuple(block.index for block in bucket.blocks)
        for rank, routes_here in found.items()
        for bucket in routes_here.others
    }
    assert sent == awaited
    for rank, routes_here in found.items():
        for bucket in (*routes_here.others, *(owned.bucket for owned in routes_here.mine)):
            assert bucket.uses
            assert all(elements(use) == bucket.elements for use in bucket.uses)
            assert bucket.elements <= ELEMENTS or len(bucket.blocks) == 1
        places = [owned.start for owned in reversed(routes_here.mine)]
        assert places == sorted(places), rank
        assert sum(len(owned.bucket.blocks) for owned in routes_here.mine) == len(routes_here.owned)


@PLANS
def test_ranks_that_send_and_add_one_message_at_a_time_all_come_to_an_end(
    plan: tuple[str, bool, bool],
) -> None:
    found = routes_of(made(plan))
    sends = {r: [(b.owner, b.row) for b in here.others] for r, here in found.items()}
    awaits = {
        rank: [(peer, owned.bucket.row) for owned in here.mine for peer in owned.contributors]
        for rank, here in found.items()
    }
    while any(sends.values()):
        ready = [
            rank
            for rank, left in sends.items()
            if left and awaits[left[0][0]][0] == (rank, left[0][1])
        ]
        assert ready, "ranks wait in a circle"
        for rank in ready:
            owner, row = sends[rank][0]
            if awaits[owner][0] == (rank, row):
                del sends[rank][0], awaits[owner][0]
    assert not any(awaits.values())


@PLANS
@pytest.mark.parametrize("shadowed", [False, True], ids=["all", "shadowed"])
def test_every_place_gets_its_parameters_once(
    plan: tuple[str, bool, bool], *, shadowed: bool
) -> None:
    after = made(plan)

    def updates_itself(key: tuple[int, int], rank: int) -> bool:
        return shadowed and bool(after.shadows) and rank in after.shadows[key[0]][key[1]]

    found = routes_of(after, "parameters")
    messages: Counter[tuple[int, int, int]] = Counter()
    for rank, here in found.items():
        gathered = gathering(here, rank, updates_itself)
        filled: Counter[int] = Counter()

        def fill(spans: tuple[Span, ...], filled: Counter[int] = filled) -> None:
            for span in spans:
                filled.update(range(span.start, span.stop))

        for owned in here.mine:
            if not owned.is_guest:
                fill(owned.bucket.first)
            for holder, spans in gathered.sends[owned.bucket.row]:
                messages[rank, holder, owned.bucket.row] += elements(spans)
        fill(tuple(second for _, second in gathered.copies))
        for bucket, uses in gathered.receives:
            for use in uses:
                fill(use)
            messages[bucket.owner, rank, bucket.row] -= elements(uses[0])
        for spans in gathered.updated_here.values():
            fill(spans)
        buffer = buffer_of(after, rank)
        held = Counter(
            place
            for span in kept_spans(after, rank, "parameters")(buffer.segments).spans
            for place in range(span.start, span.stop)
        )
        assert filled == held, rank
    assert not any(messages.values())


@pytest.mark.parametrize("layout", ["data", "tensor", "matrices in parts"])
def test_what_is_sent_is_about_what_is_estimated(layout: str) -> None:
    """Of a matrix that has one owner, whichever ranks hold its parts, more than of the rest."""
    plan = plan_of(layout, tied=False)
    fp32, ranks = PRECISIONS["fp32"], plan.stage_replicas.ranks
    estimates = [exchanged_bytes(plan, rank, precision=fp32, exact=False) for rank in ranks]
    sums = sum(b.elements for here in routes_of(plan).values() for b in here.others)
    parameters = sum(
        owned.bucket.elements * len(owned.contributors)
        for here in routes_of(plan, "parameters").values()
        for owned in here.mine
    )
    assert sum(found.gradients for found in estimates) / 4 == pytest.approx(sums, rel=0.05)
    assert sum(found.parameters for found in estimates) / 4 == pytest.approx(parameters, rel=0.05)


def test_blocks_of_a_tied_weight_travel_apart_from_their_neighbours() -> None:
    plan = plan_of("pipeline", tied=True)
    [head] = [layer for layer, spec in enumerate(plan.layers) if spec.name == "head"]
    last = plan.ranks_of((0,), plan.stage_of_layer(head))[0]
    buckets: list[Bucket] = [b for b in routes_of(plan)[last].others if not b.first]
    assert buckets, "the last stage holds the second use alone"
    assert all({block.layer for block in bucket.blocks} == {0} for bucket in buckets)
