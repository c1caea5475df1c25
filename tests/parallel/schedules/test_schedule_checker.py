"""The checker rejects every broken program set, and says where it is broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from holdfast.parallel.errors import ScheduleError
from holdfast.parallel.schedules import (
    Op,
    Program,
    check_programs,
    compute_programs,
    parse_programs,
    placement,
    with_messages,
)

_CASES = [
    ("1f1b", 3, 1, 4, 1),
    ("interleaved-1f1b", 2, 2, 3, 1),
    ("interleaved-1f1b", 2, 2, 2, 3),
    ("zb-h1", 3, 1, 4, 1),
    ("zb-v", 2, 2, 4, 1),
    ("gpipe", 2, 2, 2, 1),
    ("1f1b", 3, 1, 2, 2),
]


def complete(case: tuple[str, int, int, int, int]) -> dict[int, Program]:
    schedule, pipeline, virtual, _, _ = case
    placed = placement(schedule, pipeline, virtual)
    return with_messages(dict(enumerate(compute_programs(*case))), lambda chunk, _: placed[chunk])


def rejected(programs: dict[int, Program], case: tuple[str, int, int, int, int]) -> str:
    with pytest.raises(ScheduleError) as caught:
        check_programs(programs, case[1] * case[2], range(case[3]), stretches=case[4])
    return str(caught.value)


cases = st.sampled_from(_CASES)


@given(cases, st.data())
@settings(max_examples=150, deadline=None)
def test_a_dropped_action_is_found(case: tuple[str, int, int, int, int], data: st.DataObject):
    programs = complete(case)
    rank = data.draw(st.sampled_from(sorted(programs)))
    position = data.draw(st.integers(0, len(programs[rank]) - 1))
    lost = programs[rank][position]
    programs[rank] = programs[rank][:position] + programs[rank][position + 1 :]
    assert str(replace(lost, peer=None)) in rejected(programs, case)


@given(cases, st.data())
@settings(max_examples=150, deadline=None)
def test_a_doubled_action_is_found(case: tuple[str, int, int, int, int], data: st.DataObject):
    programs = complete(case)
    rank, target = (data.draw(st.sampled_from(sorted(programs))) for _ in range(2))
    action = data.draw(st.sampled_from(programs[rank]))
    place = data.draw(st.integers(0, len(programs[target])))
    programs[target] = (*programs[target][:place], action, *programs[target][place:])
    message = rejected(programs, case)
    assert f"{action}: is there already, at rank" in message


@given(cases, st.data())
@settings(max_examples=150, deadline=None)
def test_an_action_on_another_rank_is_found(
    case: tuple[str, int, int, int, int], data: st.DataObject
):
    programs = complete(case)
    rank, target = data.draw(st.permutations(sorted(programs)))[:2]
    position = data.draw(st.integers(0, len(programs[rank]) - 1))
    action = programs[rank][position]
    programs[rank] = programs[rank][:position] + programs[rank][position + 1 :]
    programs[target] = (*programs[target], action)
    rejected(programs, case)


@given(cases, st.data())
@settings(max_examples=150, deadline=None)
def test_a_message_to_the_wrong_rank_is_found(
    case: tuple[str, int, int, int, int], data: st.DataObject
):
    programs = complete(case)
    rank = data.draw(st.sampled_from(sorted(programs)))
    positions = [i for i, a in enumerate(programs[rank]) if a.peer is not None]
    position = data.draw(st.sampled_from(positions))
    old = programs[rank][position]
    peer = data.draw(st.integers(0, case[1]).filter(lambda p: p != old.peer))
    wrong = replace(old, peer=peer)
    programs[rank] = (*programs[rank][:position], wrong, *programs[rank][position + 1 :])
    message = rejected(programs, case)
    assert message.startswith(f"rank {rank}, position {position}, {wrong}: ")
    assert f"the peer must be rank {old.peer}" in message


@given(cases.filter(lambda case: case[4] == 1), st.data())
@settings(max_examples=400, deadline=None)
def test_exchanged_actions_are_accepted_only_if_they_run(
    case: tuple[str, int, int, int, int], data: st.DataObject
):
    """Against an interpreter that moves values and knows nothing of the checker."""
    programs = complete(case)
    rank = data.draw(st.sampled_from(sorted(programs)))
    row = list(programs[rank])
    first = data.draw(st.integers(0, len(row) - 2))
    second = data.draw(st.integers(first + 1, min(first + 4, len(row) - 1)))
    row[first], row[second] = row[second], row[first]
    programs[rank] = tuple(row)
    if runs(programs, case[1] * case[2]):
        check_programs(programs, case[1] * case[2], range(case[3]), stretches=case[4])
    else:
        rejected(programs, case)


def runs(programs: dict[int, Program], chunks: int) -> bool:
    """Whether the programs reach their end with every value at hand when it is used."""
    positions = dict.fromkeys(programs, 0)
    held: dict[int, set[tuple[str, int, int]]] = {rank: set() for rank in programs}
    travelling: set[tuple[str, int, int, int, int]] = set()
    progress = True
    while progress:
        progress = False
        for rank, program in programs.items():
            mine = held[rank]
            while positions[rank] < len(program):
                action = program[positions[rank]]
                chunk, m, peer = action.chunk, action.micro_batch, action.peer or 0
                if action.op in (Op.RECEIVE_FORWARD, Op.RECEIVE_BACKWARD):
                    kind = "input" if action.op is Op.RECEIVE_FORWARD else "gradient"
                    if (kind, chunk, m, peer, rank) not in travelling:
                        break
                    needs, gives = None, (kind, chunk, m)
                elif action.op is Op.SEND_FORWARD:
                    needs, gives = ("input", chunk + 1, m), None
                    travelling.add(("input", chunk + 1, m, rank, peer))
                elif action.op is Op.SEND_BACKWARD:
                    needs, gives = ("gradient", chunk - 1, m), None
                    travelling.add(("gradient", chunk - 1, m, rank, peer))
                elif action.op is Op.FORWARD:
                    needs, gives = ("input", chunk, m), ("input", chunk + 1, m)
                    mine.add(("kept", chunk, m))
                    if chunk == 0:
                        needs = None
                    if chunk == chunks - 1:
                        gives = ("gradient", chunk, m)
                elif action.op is Op.BACKWARD_WEIGHT:
                    needs, gives = ("half", chunk, m), None
                else:
                    if ("kept", chunk, m) not in mine:
                        return False
                    needs, gives = ("gradient", chunk, m), ("gradient", chunk - 1, m)
                    mine.add(("half", chunk, m))
                if needs is not None and needs not in mine:
                    return False
                if gives is not None:
                    mine.add(gives)
                positions[rank] += 1
                progress = True
    return all(positions[rank] == len(program) for rank, program in programs.items())


def test_crossed_receives_are_a_deadlock_that_names_both_ranks():
    programs = parse_programs(
        "0: 0F0,0SEND_F0>1,0RECV_B0<1,0B0,0F1,0SEND_F1>1,0RECV_B1<1,0B1\n"
        "1: 1RECV_F0<0,1F0,1RECV_F1<0,1F1,1B0,1SEND_B0>0,1B1,1SEND_B1>0\n"
    )
    with pytest.raises(ScheduleError) as caught:
        check_programs(programs, 2, range(2))
    assert "rank 0 waits at position 2 in 0RECV_B0<1" in str(caught.value)
    assert "rank 1 waits at position 2 in 1RECV_F1<0" in str(caught.value)
    assert "which rank 0 sends only at position 5" in str(caught.value)


def test_micro_batches_of_a_stage_may_be_computed_by_different_ranks():
    # Stage 0 on rank 0; stage 1 on rank 1 for micro-batch 0 and on rank 2 for micro-batch 7.
    owner = {(0, 0): 0, (0, 7): 0, (1, 0): 1, (1, 7): 2}
    programs = {
        0: parse_programs("0: 0F0,0F7,0B0,0B7")[0],
        1: parse_programs("1: 1F0,1B0")[1],
        2: parse_programs("2: 1F7,1I7,1W7")[2],
    }
    complete_programs = with_messages(programs, lambda chunk, m: owner[chunk, m])
    check_programs(complete_programs, 2, [0, 7])
    assert [str(a) for a in complete_programs[2]] == [
        "1RECV_F7<0",
        "1F7",
        "1I7",
        "1SEND_B7>0",
        "1W7",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0F0,0B0,3F0", "rank 0, position 2, 3F0: there is no such chunk, chunks are 0..0"),
        (
            "0: 0F0,0B0,0F5",
            "rank 0, position 2, 0F5: this is no micro-batch of the step, or stretch of one",
        ),
        ("0: 0B0,0F0", "rank 0, position 0, 0B0: comes before 0F0 at rank 0, position 1"),
        ("0: 0F0,0W0,0I0", "rank 0, position 1, 0W0: comes before 0I0"),
        ("0: 0F0,0I0", "no rank computes 0W0"),
        ("0: 0F0,0B0,0W0", "rank 0, position 2, 0W0: the whole backward is there too"),
        ("0: 0F0\n1: 0B0", "rank 1, position 0, 0B0: 0F0 is on another rank"),
        ("0: 0F0,0SEND_F0>1,0B0", "rank 0, position 1, 0SEND_F0>1: there is no chunk 1"),
    ],
)
def test_the_error_names_rank_position_and_action(text: str, message: str):
    with pytest.raises(ScheduleError) as caught:
        check_programs(parse_programs(text), 1, [0])
    assert message in str(caught.value)


def test_a_message_within_one_rank_is_refused():
    text = "0: 0F0,0SEND_F0>0,1RECV_F0<0,1F0,1B0,0B0"
    with pytest.raises(ScheduleError, match="both chunks are on this rank"):
        check_programs(parse_programs(text), 2, [0])


def test_more_activations_than_the_cap_are_refused():
    programs = complete(("1f1b", 3, 1, 4, 1))
    check_programs(programs, 3, range(4), cap={0: 3, 1: 2, 2: 1})
    with pytest.raises(ScheduleError, match="rank 1 keeps 2 chunk activations at once, 1 are"):
        check_programs(programs, 3, range(4), cap={0: 3, 1: 1})


def test_a_backward_in_an_evaluation_program_is_refused():
    with pytest.raises(ScheduleError, match="position 1, 0B0: a backward in a forward-only"):
        check_programs(parse_programs("0: 0F0,0B0"), 1, [0], forward_only=True)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("0: 0F0.1,0F0.0,0B0.1,0B0.0", "rank 0, position 0, 0F0.1: 0F0.0 must come before it"),
        ("0: 0F0.0,0F0.1,0B0.0,0B0.1", "rank 0, position 2, 0B0.0: 0B0.1 must come before it"),
        ("0: 0F0.0,0B0.0\n1: 0F0.1,0B0.1", "rank 1, position 0, 0F0.1: 0F0.0 must come before it"),
        ("0: 0F0,0B0", "0F0: this is no micro-batch of the step, or stretch of one"),
        ("0: 0F0.0,0B0.0", "no rank computes 0F0.1"),
    ],
)
def test_stretches_out_of_order_are_found(program: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        check_programs(parse_programs(program), 1, range(1), stretches=2)
