"""What a plan is said to cost, against sums done by hand."""

from __future__ import annotations

import pytest

from holdfast.parallel.layout.boxes import Box
from holdfast.parallel.layout.mesh import Mesh
from holdfast.parallel.layout.parameters import Initial, LayerSpec, ParameterSpec
from holdfast.parallel.optimizer.rules.adamw import ADAMW
from holdfast.parallel.optimizer.rules.rule import StateFormat
from holdfast.parallel.plan.cost import (
    exchanged_bytes,
    rank_memory,
    replica_timeline,
    step_time_s,
)
from holdfast.parallel.plan.initial import make_plan
from holdfast.parallel.plan.plan import Plan
from holdfast.parallel.precision import PRECISIONS

ROWS, COLUMNS = 4, 6
ELEMENTS = ROWS * COLUMNS


def layer(name: str, flops: float) -> LayerSpec:
    weight = ParameterSpec(
        name=f"{name}.weight",
        shape=(ROWS, COLUMNS),
        box=Box.whole((ROWS, COLUMNS)),
        local="weight",
        local_row=0,
        initial=Initial("normal", 0.02),
        decay=True,
        copies=(0,),
    )
    return LayerSpec(name, ((weight,),), flops, activation_bytes=100, output_bytes=40)


def plan_of(data: int, pipeline: int, micro_batches: int, **changes: object) -> Plan:
    """Four blocks of 10 operations between an embedding and a head that cost nothing."""
    layers = [layer("embedding", 0.0), *(layer(f"block.{i}", 10.0) for i in range(4))]
    arguments = {
        "virtual": 1,
        "schedule": "1f1b",
        "micro_batches": micro_batches,
        "block_elements": COLUMNS,
        **changes,
    }
    mesh = Mesh.of(data=data, pipeline=pipeline)
    return make_plan([*layers, layer("head", 0.0)], mesh, **arguments)  # pyrefly: ignore


@pytest.mark.parametrize(
    ("precision", "exact", "parameter", "gradient", "state"),
    [
        ("fp32", True, 4, 8, 12),
        ("fp32", False, 4, 4, 12),
        ("bf16", True, 2, 8, 16),
        ("bf16", False, 2, 4, 16),
        ("fp64", True, 8, 8, 24),
        ("fp64", False, 8, 8, 24),
    ],
)
def test_memory_is_bytes_per_element_of_what_a_rank_holds_and_owns(
    precision: str, exact: bool, parameter: int, gradient: int, state: int
) -> None:
    kept = PRECISIONS[precision]
    plan = plan_of(data=2, pipeline=2, micro_batches=8)
    ranks = [
        rank_memory(
            plan, r, precision=kept, owned_bytes=StateFormat(ADAMW, kept).owned_bytes, exact=exact
        )
        for r in range(4)
    ]
    for memory in ranks:
        assert memory.parameters == 3 * ELEMENTS * parameter
        assert memory.gradients == 3 * ELEMENTS * gradient
    assert sum(memory.optimizer for memory in ranks) == 6 * ELEMENTS * state


@pytest.mark.parametrize(("schedule", "first", "last"), [("1f1b", 4, 1), ("gpipe", 8, 8)])
def test_activations_are_those_in_flight_at_once(schedule: str, first: int, last: int) -> None:
    plan = plan_of(data=1, pipeline=4, micro_batches=8, schedule=schedule)
    peaks = [
        rank_memory(plan, r, precision=PRECISIONS["fp32"], owned_bytes=12, exact=True).activations
        for r in range(4)
    ]
    # The outer stages have two layers of 100 bytes each, with the embedding and with the head.
    assert (peaks[0], peaks[3]) == (first * 200, last * 200)


@pytest.mark.parametrize("micro_batches", [4, 8, 16])
def test_the_bubble_of_equal_stages_is_the_published_one(micro_batches: int) -> None:
    plan = plan_of(data=1, pipeline=4, micro_batches=micro_batches)
    assert replica_timeline(plan).bubble == pytest.approx(3 / micro_batches)


def test_a_step_without_peers_takes_its_operations() -> None:
    plan = plan_of(data=1, pipeline=1, micro_batches=5)
    estimate = step_time_s(
        plan, precision=PRECISIONS["fp32"], exact=True, flops_per_s=2.0, link_bytes_per_s=1.0
    )
    assert estimate == pytest.approx(5 * 3 * 40.0 / 2.0)


def test_a_step_waits_for_messages_of_its_pipeline() -> None:
    plan = plan_of(data=1, pipeline=2, micro_batches=1)
    free, paid = (replica_timeline(plan, link_bytes_per_s=rate).makespan for rate in (None, 8.0))
    assert paid - free == pytest.approx(2 * 40 / 8.0)


@pytest.mark.parametrize(
    ("exact", "packing", "sums"), [(True, True, 5), (True, False, 8), (False, True, 4)]
)
@pytest.mark.parametrize(
    ("rate", "beside"),
    [
        (1.0, (2 * 40.0, 40.0)),
        (10.0, (2 * 40.0, 40.0)),  # what takes no longer than the passes beside it is free
        (1.0, (0.0, 0.0)),
    ],
    ids=["slow link", "fast link", "no overlap"],
)
def test_a_step_ends_with_what_the_exchange_takes_longer_than_the_passes_beside_it(
    exact: bool, packing: bool, sums: int, rate: float, beside: tuple[float, float]
) -> None:
    plan = plan_of(data=2, pipeline=1, micro_batches=5)
    form = {"precision": PRECISIONS["fp32"], "exact": exact, "packing": packing}
    sent = exchanged_bytes(plan, 0, **form)
    half = 6 * ELEMENTS / 2
    assert (sent.gradients, sent.parameters) == (half * sums, half * 4)
    estimate = step_time_s(
        plan, **form, overlap=any(beside), flops_per_s=1.0, link_bytes_per_s=rate
    )
    waits = max(0.0, half * sums / rate - beside[0]) + max(0.0, half * 4 / rate - beside[1])
    assert estimate == pytest.approx(3 * 3 * 40.0 + waits)  # of the replica with most micro-batches
