"""Which node or link is sick: decided by what the others have, and by nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import pytest
from hypothesis import given, strategies as st

from holdfast.launch.health.admission import NodeRefused, require_health
from holdfast.launch.health.job import Offset, clock_checks, job_report
from holdfast.launch.health.judgement import judged
from holdfast.launch.health.pairs import LinkRate, partners, rounds_of, verdict_of
from holdfast.launch.health.report import Check, HealthReport, failed


def nodes(name: str, values: list[float | str], comparison: str) -> list[HealthReport]:
    """A report for each value, of nodes named 0, 1, ..."""
    return [
        HealthReport(str(number), (Check(name, value, comparison=comparison),))  # type: ignore[arg-type]
        for number, value in enumerate(values)
    ]


def sick(reports: list[HealthReport]) -> list[str]:
    return [report.node for report in reports if not report.passed]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([100.0, 99.0, 101.0, 60.0], ["3"]),
        ([100.0, 71.0, 100.0], []),
        ([100.0, 60.0], ["1"]),
        ([100.0, 100.0, 60.0, 60.0], ["2", "3"]),  # half of them
        ([60.0], []),
    ],
)
def test_a_rate_is_held_against_the_median_of_the_others(
    values: list[float | str], expected: list[str]
) -> None:
    found = judged(nodes("rate", values, "least"))
    assert sick(found) == expected
    for report in found:
        (check,) = report.checks
        assert (check.reason == "") == check.passed


def test_the_limit_is_told() -> None:
    (_, slow) = judged(nodes("rate", [100.0, 60.0], "least"))
    (check,) = slow.checks
    assert check.limit == pytest.approx(70)
    assert check.reason == "60 is below 0.7 of the other nodes' 100"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", "a", "b"], ["2"]),
        (["b", "a", "a", "a"], ["0"]),
        (["a", "b"], ["0", "1"]),  # it is unknown which is wrong
        (["a", "b", "c"], ["0", "1", "2"]),
        (["a", "a", "b", "b"], ["0", "1", "2", "3"]),
        (["a"], []),
    ],
)
def test_what_must_be_equal_is_held_against_what_most_nodes_have(
    values: list[float | str], expected: list[str]
) -> None:
    assert sick(judged(nodes("bits", values, "equal"))) == expected


def test_a_difference_that_may_be_is_told_and_fails_no_node() -> None:
    found = judged(nodes("kernel", ["6.1", "6.1", "6.2"], "told"))
    assert sick(found) == []
    assert found[2].checks[0].reason == "6.2, and other nodes have 6.1"
    assert found[0].checks[0].reason == ""


def test_a_newcomer_is_held_against_those_that_have_begun_the_run() -> None:
    (begun,) = nodes("bits", ["a"], "equal")
    (other,) = nodes("bits", ["b"], "equal")
    newcomer = HealthReport("new", other.checks)
    with pytest.raises(
        NodeRefused, match="node new is not let in: bits: b, and other nodes have a"
    ):
        require_health([newcomer], [begun])
    assert require_health([HealthReport("new", begun.checks)], [begun])[0].passed


def test_what_a_node_has_shown_by_itself_stays() -> None:
    report = HealthReport("0", (failed("memory", 1.0, "MiB", "it is broken"),))
    assert sick(judged([report, HealthReport("1", (Check("memory", 1.0),))])) == ["0"]
    with pytest.raises(NodeRefused, match="node 0 is not let in: memory: it is broken"):
        require_health([report])


@given(st.integers(1, 40))
def test_each_pair_meets_once_and_no_node_is_twice_in_a_round(count: int) -> None:
    met = [pair for number in range(rounds_of(count, 0)) for pair in partners(count, number)]
    assert sorted(met) == list(itertools.combinations(range(count), 2))
    for number in range(rounds_of(count, 0)):
        seated = [node for pair in partners(count, number) for node in pair]
        assert len(seated) == len(set(seated)) == count - count % 2


@given(st.integers(3, 40))
def test_two_rounds_give_every_node_two_partners(count: int) -> None:
    own = {node: set[int]() for node in range(count)}
    for number in range(rounds_of(count, 2)):
        for a, b in partners(count, number):
            own[a].add(b)
            own[b].add(a)
    assert all(len(found) >= 2 for found in own.values())


def rates(
    count: int, rounds: int, slow: Collection[int] = (), slow_link: tuple[int, int] = (-1, -1)
) -> list[LinkRate]:
    """What is measured between so many nodes, of which some or one link are slow."""
    return [
        LinkRate(number, pair, 1e7 if {*slow} & {*pair} or pair == slow_link else 1e8, 1e-4)
        for number in range(rounds_of(count, rounds))
        for pair in partners(count, number)
    ]


@given(st.integers(4, 24), st.data())
def test_a_slow_end_is_named_after_two_rounds_and_only_it(count: int, data: st.DataObject) -> None:
    slow = data.draw(st.integers(0, count - 1))
    verdict = verdict_of(rates(count, 2, slow=[slow]))
    assert list(verdict.nodes) == [slow]
    assert all(slow in link for link in verdict.links)


@pytest.mark.parametrize("slow", [*itertools.combinations(range(6), 2)])
def test_two_slow_ends_of_six_are_told_apart_by_all_pairs(slow: tuple[int, int]) -> None:
    """More than half of the links are slow then."""
    assert sorted(verdict_of(rates(6, 0, slow=slow)).nodes) == [*slow]


@given(st.integers(4, 24), st.data())
def test_a_slow_link_is_named_and_no_end_of_it(count: int, data: st.DataObject) -> None:
    a = data.draw(st.integers(0, count - 2))
    link = (a, data.draw(st.integers(a + 1, count - 1)))
    verdict = verdict_of(rates(count, 0, slow_link=link))
    assert verdict.nodes == {}
    assert list(verdict.links) == [link]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_links_that_are_all_alike_are_well(count: int) -> None:
    verdict = verdict_of(rates(count, 2))
    assert (verdict.nodes, verdict.links) == ({}, {})


def test_a_link_that_cannot_be_used_is_slow_and_so_is_one_with_a_long_way() -> None:
    well = [LinkRate(0, (0, 3), 1e8, 1e-4), LinkRate(1, (2, 3), 1e8, 1e-4)]
    none = LinkRate(0, (1, 2), 0.0, 1e9)
    late = LinkRate(1, (0, 1), 1e8, 0.02)
    verdict = verdict_of([*well, none, late])
    assert list(verdict.nodes) == [1]
    assert set(verdict.links) == {(1, 2), (0, 1)}
    assert "20 ms, above 3 times the other links' 0.1" in verdict.links[0, 1]


def test_the_report_of_a_job_names_nodes_by_their_names() -> None:
    reports = [HealthReport(name) for name in "abcd"]
    report = job_report(reports, rates(4, 2, slow=[1]), [Offset()] * 4)
    assert sick(list(report.nodes)) == ["b"]
    assert [link.nodes for link in report.links if not link.passed] == [("b", "c"), ("a", "b")]
    assert not report.passed


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([0.0, 0.9, -0.9], []),
        ([0.0, 1.1, 0.0], [1]),
        ([0.0, -7.0, 0.1, 0.2], [1]),
        ([0.0, 30.0, 30.1, 29.9], [0]),  # the clock by which they were measured
        ([0.0], []),
    ],
)
def test_a_clock_beyond_a_second_of_the_others_is_wrong(
    seconds: list[float], expected: list[int]
) -> None:
    checks = clock_checks([Offset(offset) for offset in seconds])
    assert [number for number, check in enumerate(checks) if not check.passed] == expected


def test_a_node_that_does_not_reach_the_first_one_says_so() -> None:
    checks = clock_checks([Offset(), Offset(error="no route to host")])
    assert [check.passed for check in checks] == [True, False]
    assert checks[1].reason == "the first node cannot be reached: no route to host"
