"""The simulator, the text form and the chart."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from holdfast.parallel.errors import ScheduleError
from holdfast.parallel.schedules import (
    Action,
    Op,
    compute_programs,
    draw,
    parse_programs,
    peak_in_flight,
    render_programs,
    simulate,
    unit_cost,
)

_MESSAGES = {Op.SEND_FORWARD, Op.RECEIVE_FORWARD, Op.SEND_BACKWARD, Op.RECEIVE_BACKWARD}


@st.composite
def actions(draw_value: st.DrawFn) -> Action:
    op = draw_value(st.sampled_from(Op))
    numbers = st.integers(0, 10_000)
    peer = draw_value(numbers) if op in _MESSAGES else None
    return Action(op, draw_value(numbers), draw_value(numbers), peer)


@given(st.dictionaries(st.integers(0, 99), st.lists(actions()).map(tuple), max_size=4))
def test_text_form_round_trips(programs: dict[int, tuple[Action, ...]]):
    assert parse_programs(render_programs(programs)) == programs


def test_text_form_is_that_of_torch_plus_the_peer():
    assert str(Action(Op.FORWARD, 2, 0)) == "2F0"
    assert str(Action(Op.SEND_FORWARD, 2, 0, 1)) == "2SEND_F0>1"
    assert str(Action(Op.RECEIVE_BACKWARD, 12, 34, 5)) == "12RECV_B34<5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0F0,0X1", "line 1: cannot read the action '0X1'"),
        ("0: 0SEND_F0", "'>RANK' at its end"),
        ("0: 0RECV_F0>1", "'<RANK' at its end"),
        ("0: 0F0<1", "F takes no peer"),
        ("0F0,0B0", "line 1: '0F0,0B0' does not start with 'RANK:'"),
        ("# two\n1: 0F0\n1: 0B0", "line 3: rank 1 has a program already"),
    ],
)
def test_wrong_text_is_refused_with_its_line(text: str, message: str):
    with pytest.raises(ScheduleError, match=message):
        parse_programs(text)


def test_times_of_a_hand_computed_step():
    programs = dict(enumerate(compute_programs("1f1b", 2, 1, 2)))
    timeline = simulate(programs, unit_cost(), message_cost=0.25)
    spans = {
        rank: [(str(s.action), s.start, s.stop) for s in timeline.spans[rank]] for rank in (0, 1)
    }
    assert spans[0] == [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 4.5, 6.5), ("0B1", 7.5, 9.5)]
    assert spans[1] == [
        ("1F0", 1.25, 2.25),
        ("1B0", 2.25, 4.25),
        ("1F1", 4.25, 5.25),
        ("1B1", 5.25, 7.25),
    ]
    assert timeline.makespan == 9.5
    assert timeline.busy == {0: 6, 1: 6}
    assert timeline.bubble == pytest.approx(9.5 / 6 - 1)
    assert timeline.idle(0) == 3.5
    assert timeline.idle(1) == 0


def test_costs_may_differ_by_action_and_message():
    programs = parse_programs(
        "0: 0F0,0SEND_F0>7,0RECV_B0<7,0B0\n7: 1RECV_F0<0,1F0,1I0,1SEND_B0>0,1W0\n"
    )
    timeline = simulate(
        programs,
        cost=lambda action: {"0F0": 1, "0B0": 5, "1F0": 2, "1I0": 3, "1W0": 4}[str(action)],
        message_cost=lambda send: 10 if send.op is Op.SEND_FORWARD else 20,
    )
    assert [span.stop for span in timeline.spans[7]] == [13, 16, 20]
    assert timeline.spans[0][1].start == 36
    assert timeline.makespan == 41


def test_sends_do_not_wait_and_a_slow_message_delays_only_its_receiver():
    programs = dict(enumerate(compute_programs("gpipe", 2, 1, 3)))
    timeline = simulate(programs, unit_cost(), message_cost=100)
    assert [span.stop for span in timeline.spans[0][:3]] == [1, 2, 3]
    assert timeline.spans[1][0].start == 101


def test_saved_activations_are_freed_by_w_and_in_flight_ones_by_i():
    program = parse_programs("0: 0F0,0I0,0F1,0I1,0F2,0W0,0W1,0B2")[0]
    assert peak_in_flight(program, until="input") == 1
    assert peak_in_flight(program, until="weight") == 3
    assert peak_in_flight(program, size=lambda chunk: 2.5 + chunk) == 7.5


def test_a_large_step_is_simulated_action_by_action():
    programs = dict(enumerate(compute_programs("interleaved-1f1b", 16, 4, 64)))
    timeline = simulate(programs, unit_cost(virtual=4))
    assert sum(map(len, timeline.spans.values())) == 2 * 16 * 4 * 64
    assert timeline.bubble == pytest.approx(15 / (4 * 64))


def test_an_endless_wait_names_who_never_sends():
    programs = parse_programs("0: 0F0\n1: 1RECV_F0<0,1F0")
    with pytest.raises(
        ScheduleError, match="rank 1 waits at position 0 in 1RECV_F0<0, which rank 0 never"
    ):
        simulate(programs, unit_cost())


def test_chart_of_1f1b():
    programs = dict(enumerate(compute_programs("1f1b", 2, 1, 3)))
    assert draw(simulate(programs, unit_cost())) == (
        "0 |F0F1....B0bbF2B1bb..B2bb|  75% busy, peak 2\n"
        "1 |..F0B0bbF1B1bbF2B2bb....|  75% busy, peak 1\n"
        "makespan 12, bubble 33.3%\n"
    )


def test_chart_keeps_to_its_width():
    programs = dict(enumerate(compute_programs("interleaved-1f1b", 4, 2, 40)))
    rows = draw(simulate(programs, unit_cost(virtual=2)), width=50).splitlines()
    assert {row.rindex("|") - row.index("|") - 1 for row in rows[:-1]} == {50}


def test_chart_of_nothing():
    assert draw(simulate({0: ()}, unit_cost())) == "nothing to compute\n"
