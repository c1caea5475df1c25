"""Generated orders against published formulas, measured tables, golden files and torch's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from holdfast.parallel.errors import ScheduleError
from holdfast.parallel.schedules import (
    SCHEDULES,
    Action,
    Op,
    Program,
    check_programs,
    compute_programs,
    forward_only,
    parse_programs,
    peak_in_flight,
    placement,
    render_programs,
    simulate,
    unit_cost,
    with_messages,
)

GOLDEN = Path(__file__).parent / "golden"


def complete(schedule: str, pipeline: int, virtual: int, micro_batches: int) -> dict[int, Program]:
    placed = placement(schedule, pipeline, virtual)
    programs = compute_programs(schedule, pipeline, virtual, micro_batches)
    return with_messages(dict(enumerate(programs)), lambda chunk, _: placed[chunk])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    allowed = {"1f1b": [1], "zb-h1": [1], "zb-v": [2]}.get(schedule, [1, 2, 3, 4])
    return (
        schedule,
        draw(st.integers(1, 8)),
        draw(st.sampled_from(allowed)),
        draw(st.integers(1, 40)),
    )


@given(shapes())
@settings(max_examples=300, deadline=None)
def test_any_number_of_micro_batches_gives_a_sound_schedule(shape: tuple[str, int, int, int]):
    _, pipeline, virtual, micro_batches = shape
    programs = complete(*shape)
    check_programs(programs, pipeline * virtual, range(micro_batches))
    timeline = simulate(programs, unit_cost(virtual=virtual))
    # Nothing can end sooner than a rank's work plus the time until the last rank may start.
    start = (pipeline - 1) / virtual
    assert timeline.makespan >= 3 * micro_batches + start - 1e-9
    assert all(busy == pytest.approx(3 * micro_batches) for busy in timeline.busy.values())


@given(
    st.sampled_from([("gpipe", 1), ("gpipe", 3), ("1f1b", 1), *[("interleaved-1f1b", 2)] * 2]),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_stretches_pass_in_order_and_divide_the_bubble(
    chosen: tuple[str, int], pipeline: int, micro_batches: int, stretches: int
) -> None:
    schedule, virtual = chosen
    placed = placement(schedule, pipeline, virtual)
    shape = (schedule, pipeline, virtual, micro_batches, stretches)
    programs = with_messages(
        dict(enumerate(compute_programs(*shape))), lambda chunk, _: placed[chunk]
    )
    check_programs(programs, pipeline * virtual, range(micro_batches), stretches=stretches)
    passages = micro_batches * stretches
    whole = unit_cost(virtual=virtual)
    timeline = simulate(programs, lambda action: whole(action) / stretches)
    if virtual == 1:
        assert timeline.bubble == pytest.approx((pipeline - 1) / passages)
        # As in SlimPipe: a rank keeps a sequence, and a stretch for each later rank.
        most = passages if schedule == "gpipe" else min(stretches + pipeline - 1, passages)
        assert timeline.peak_saved[0] == most
    elif stretches >= pipeline:
        assert timeline.bubble == pytest.approx((pipeline - 1) / passages / virtual)
    forwards = forward_only(*shape)
    evaluated = with_messages(dict(enumerate(forwards)), lambda chunk, _: placed[chunk])
    check_programs(
        evaluated,
        pipeline * virtual,
        range(micro_batches),
        stretches=stretches,
        forward_only=True,
    )


@given(shapes())
@settings(max_examples=100, deadline=None)
def test_evaluation_programs_are_sound(shape: tuple[str, int, int, int]):
    schedule, pipeline, virtual, micro_batches = shape
    placed = placement(schedule, pipeline, virtual)
    programs = with_messages(dict(enumerate(forward_only(*shape))), lambda chunk, _: placed[chunk])
    check_programs(programs, pipeline * virtual, range(micro_batches), forward_only=True)


@pytest.mark.parametrize(
    ("schedule", "virtual"), [("1f1b", 1), ("interleaved-1f1b", 2), ("zb-v", 2)]
)
def test_evaluation_waits_only_for_the_pipeline_to_fill(schedule: str, virtual: int):
    programs = dict(enumerate(forward_only(schedule, 4, virtual, 16)))
    timeline = simulate(programs, unit_cost(virtual=virtual))
    assert timeline.makespan <= 16 + (4 * virtual - 1) / virtual


# Simulated from torch 2.13's own orders: F = 1, B = 2, I = W = 1 per rank, chunk cost / virtual.
@pytest.mark.parametrize(
    ("schedule", "virtual", "pipeline", "micro_batches", "makespan", "in_flight", "saved"),
    [
        ("gpipe", 2, 4, 8, 28.5, [16, 16, 16, 16], 16),
        ("1f1b", 1, 4, 8, 33.0, [4, 3, 2, 1], 4),
        ("interleaved-1f1b", 2, 4, 8, 28.5, [11, 9, 7, 5], 11),
        ("interleaved-1f1b", 4, 4, 8, 26.25, [19, 17, 15, 13], 19),
        ("zb-h1", 1, 4, 8, 27.0, [4, 3, 2, 1], 4),
        ("zb-v", 2, 4, 8, 25.5, [8, 8, 8, 8], 8),
        ("1f1b", 1, 8, 32, 117.0, [8, 7, 6, 5, 4, 3, 2, 1], 8),
        ("interleaved-1f1b", 2, 8, 32, 106.5, [23, 21, 19, 17, 15, 13, 11, 9], 23),
        ("interleaved-1f1b", 4, 8, 32, 101.25, [39, 37, 35, 33, 31, 29, 27, 25], 39),
        ("zb-h1", 1, 8, 32, 103.0, [8, 7, 6, 5, 4, 3, 2, 1], 8),
        ("zb-v", 2, 8, 32, 99.5, [16] * 8, 16),
    ],
)
def test_makespan_and_peaks_are_those_measured_on_torch_orders(
    schedule: str,
    virtual: int,
    pipeline: int,
    micro_batches: int,
    makespan: float,
    in_flight: list[int],
    saved: int,
):
    timeline = simulate(
        complete(schedule, pipeline, virtual, micro_batches), unit_cost(virtual=virtual)
    )
    assert timeline.makespan == makespan
    assert list(timeline.peak_in_flight.values()) == in_flight
    assert max(timeline.peak_saved.values()) == saved


@pytest.mark.parametrize("pipeline", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 8, 24])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b(schedule: str, pipeline: int, micro_batches: int):
    timeline = simulate(complete(schedule, pipeline, 1, micro_batches), unit_cost())
    assert timeline.bubble == pytest.approx((pipeline - 1) / micro_batches)


@pytest.mark.parametrize("pipeline", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("virtual", [1, 2, 3, 4])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_bubble_of_interleaved(pipeline: int, virtual: int, rounds: int):
    micro_batches = rounds * pipeline
    programs = complete("interleaved-1f1b", pipeline, virtual, micro_batches)
    bubble = simulate(programs, unit_cost(virtual=virtual)).bubble
    assert bubble == pytest.approx((pipeline - 1) / (virtual * micro_batches))


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(4, 5), (4, 10), (8, 26), (3, 10)])
@pytest.mark.parametrize("virtual", [2, 3])
def test_left_over_micro_batches_cost_interleaved_no_bubble(
    pipeline: int, micro_batches: int, virtual: int
):
    programs = complete("interleaved-1f1b", pipeline, virtual, micro_batches)
    timeline = simulate(programs, unit_cost(virtual=virtual))
    assert timeline.bubble == pytest.approx((pipeline - 1) / (virtual * micro_batches))


@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_bubble_of_zb_h1_is_a_third_of_1f1b(pipeline: int, rounds: int):
    micro_batches = rounds * pipeline
    plain = simulate(complete("1f1b", pipeline, 1, micro_batches), unit_cost())
    split = simulate(complete("zb-h1", pipeline, 1, micro_batches), unit_cost())
    assert split.bubble == pytest.approx(plain.bubble / 3)


@pytest.mark.parametrize("pipeline", [2, 4, 8])
@pytest.mark.parametrize(
    ("forward", "backward_input", "backward_weight"), [(1, 1.5, 0.5), (1, 1, 0.5), (2, 3, 2)]
)
def test_bubble_of_zb_h1_follows_its_formula_for_uneven_costs(
    pipeline: int, forward: float, backward_input: float, backward_weight: float
):
    cost = unit_cost(forward, backward_input, backward_weight)
    timeline = simulate(complete("zb-h1", pipeline, 1, 4 * pipeline), cost)
    work = 4 * pipeline * (forward + backward_input + backward_weight)
    idle = (pipeline - 1) * (forward + backward_input - backward_weight)
    assert timeline.makespan == pytest.approx(work + idle)


@pytest.mark.parametrize(("pipeline", "rounds"), [(2, 2), (4, 2), (4, 8), (8, 4)])
def test_zb_v_is_idle_only_before_its_first_action(pipeline: int, rounds: int):
    timeline = simulate(complete("zb-v", pipeline, 2, rounds * pipeline), unit_cost(virtual=2))
    assert [timeline.idle(rank) for rank in range(pipeline)] == [0] * pipeline
    assert timeline.makespan == 3 * rounds * pipeline + (pipeline - 1) / 2


@given(shapes())
@settings(max_examples=200, deadline=None)
def test_activations_stay_within_their_published_bounds(shape: tuple[str, int, int, int]):
    schedule, pipeline, virtual, micro_batches = shape
    whole_groups = micro_batches % pipeline == 0
    for index, program in enumerate(compute_programs(*shape)):
        until_input = peak_in_flight(program, until="input")
        until_weight = peak_in_flight(program, until="weight")
        if schedule == "gpipe":
            assert until_weight == virtual * micro_batches
        elif schedule == "1f1b" or virtual == 1:
            assert until_input == min(pipeline - index, micro_batches)
        elif schedule == "interleaved-1f1b":
            bound = (virtual - 1) * pipeline + 2 * (pipeline - index - 1) + 1
            spare = 0 if whole_groups else virtual - 1
            assert until_weight <= min(bound + spare, virtual * micro_batches)
            if whole_groups:
                assert until_weight == min(bound, virtual * micro_batches)
        if schedule in ("1f1b", "zb-h1"):
            assert until_weight <= pipeline
        if schedule == "zb-v":
            assert until_weight <= 2 * pipeline


@given(shapes())
@settings(max_examples=50, deadline=None)
def test_chunk_0_never_splits_its_backward(shape: tuple[str, int, int, int]):
    actions = [a for program in compute_programs(*shape) for a in program if a.chunk == 0]
    assert {a.op for a in actions} == {Op.FORWARD, Op.BACKWARD}


def torch_stages(pipeline: int, virtual: int) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            num_stages=pipeline * virtual,
            group_size=pipeline,
            group_rank=0,
            stage_index=pipeline * local,
            is_last=False,
            submod=torch.nn.Identity(),
            stage_index_to_group_rank={},
        )
        for local in range(virtual)
    ]


def from_torch(order: dict) -> dict[int, Program]:
    """torch's order without bubbles and bookkeeping."""
    texts = {rank: [str(a) for a in actions if a is not None] for rank, actions in order.items()}
    return {
        rank: tuple(Action.parse(text) for text in row if "REDUCE_GRAD" not in text)
        for rank, row in texts.items()
    }


def split_everywhere(programs: tuple[Program, ...]) -> dict[int, Program]:
    """Whole backwards written as I and W, as torch's zero-bubble orders have them."""
    split: dict[int, Program] = {}
    for rank, program in enumerate(programs):
        actions: list[Action] = []
        for a in program:
            ops = (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT) if a.op is Op.BACKWARD else (a.op,)
            actions += [Action(op, a.chunk, a.micro_batch) for op in ops]
        split[rank] = tuple(actions)
    return split


@pytest.mark.parametrize("pipeline", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_1f1b_is_the_order_of_torch(pipeline: int, rounds: int):
    stand_in = SimpleNamespace(_num_stages=pipeline, _n_microbatches=rounds * pipeline)
    order = torch_schedules.Schedule1F1B._get_pipeline_order(stand_in)  # pyrefly: ignore
    assert order is not None
    ours, theirs = compute_programs("1f1b", pipeline, 1, rounds * pipeline), from_torch(order)
    assert ours[:-1] == tuple(theirs[rank] for rank in range(pipeline - 1))
    # torch 2.13 numbers the last rank's forwards from 1 here, though it runs them from 0.
    assert [a.op for a in ours[-1]] == [a.op for a in theirs[pipeline - 1]]


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"),
    [(2, 2, 2), (2, 2, 8), (4, 2, 8), (4, 4, 8), (8, 2, 16), (4, 2, 5), (4, 3, 10), (5, 2, 12)],
)
def test_interleaved_is_the_order_of_torch(pipeline: int, virtual: int, micro_batches: int):
    stages = torch_stages(pipeline, virtual)
    theirs = torch_schedules.ScheduleInterleaved1F1B(stages, micro_batches)  # pyrefly: ignore
    ours = compute_programs("interleaved-1f1b", pipeline, virtual, micro_batches)
    assert dict(enumerate(ours)) == from_torch(theirs.pipeline_order)


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 4), (4, 4), (4, 8), (8, 16)])
def test_zb_h1_is_the_order_of_torch(pipeline: int, micro_batches: int):
    stages = torch_stages(pipeline, 1)
    theirs = torch_schedules.ScheduleInterleavedZeroBubble(stages, micro_batches)  # pyrefly: ignore
    ours = split_everywhere(compute_programs("zb-h1", pipeline, 1, micro_batches))
    assert ours == from_torch(theirs.pipeline_order)


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 3), (4, 8), (4, 11), (8, 16)])
def test_zb_v_is_the_order_of_torch(pipeline: int, micro_batches: int):
    stages = torch_stages(pipeline, 2)
    theirs = torch_schedules.ScheduleZBVZeroBubble(stages, micro_batches)  # pyrefly: ignore
    ours = split_everywhere(compute_programs("zb-v", pipeline, 2, micro_batches))
    assert ours == from_torch(theirs.pipeline_order)


@given(shapes())
@settings(max_examples=60, deadline=None)
def test_torch_dry_run_finds_no_deadlock(shape: tuple[str, int, int, int]):
    schedule, pipeline, virtual, _ = shape
    placed = placement(schedule, pipeline, virtual)
    programs = complete(*shape)
    theirs = {
        rank: [
            torch_schedules._Action.from_str(str(Action(a.op, a.chunk, a.micro_batch)))
            for a in program
        ]
        for rank, program in programs.items()
    }
    done = torch_schedules._simulate_comms_compute(theirs, placed.__getitem__, len(placed))
    assert [sum(a is not None for a in done[r]) for r in programs] == list(
        map(len, programs.values())
    )


@pytest.mark.parametrize(
    ("schedule", "pipeline", "virtual", "micro_batches"),
    [
        ("gpipe", 2, 2, 3),
        ("1f1b", 4, 1, 6),
        ("interleaved-1f1b", 2, 2, 5),
        ("interleaved-1f1b", 4, 2, 7),
        ("zb-h1", 3, 1, 5),
        ("zb-v", 2, 2, 2),
        ("zb-v", 2, 2, 5),
    ],
)
def test_programs_are_those_of_the_golden_files(
    schedule: str, pipeline: int, virtual: int, micro_batches: int
):
    path = GOLDEN / f"{schedule}-p{pipeline}-v{virtual}-m{micro_batches}.txt"
    programs = complete(schedule, pipeline, virtual, micro_batches)
    assert render_programs(programs) == path.read_text()
    assert parse_programs(path.read_text()) == programs


@pytest.mark.parametrize(
    ("schedule", "pipeline", "virtual", "micro_batches", "message"),
    [
        ("1f1b2", 2, 1, 4, "allowed are 'gpipe', '1f1b', .*did you mean '1f1b'"),
        ("1f1b", 2, 2, 4, "set parallel.virtual = 1, or use interleaved-1f1b"),
        ("zb-h1", 2, 3, 4, "set parallel.virtual = 1"),
        ("zb-v", 2, 1, 4, "set parallel.virtual = 2"),
        ("gpipe", 0, 1, 4, "parallel.pipeline = 0"),
        ("gpipe", 2, 0, 4, "parallel.virtual = 0"),
        ("gpipe", 2, 1, 0, "micro_batches = 0"),
    ],
)
def test_impossible_numbers_say_what_to_change(
    schedule: str, pipeline: int, virtual: int, micro_batches: int, message: str
):
    with pytest.raises(ScheduleError, match=message):
        compute_programs(schedule, pipeline, virtual, micro_batches)


def test_zb_v_goes_down_the_pipeline_and_back_up():
    assert placement("zb-v", 3, 2) == (0, 1, 2, 2, 1, 0)
    assert placement("interleaved-1f1b", 3, 2) == (0, 1, 2, 0, 1, 2)
