"""The history of a run's ranks, as its events.jsonl tells it: changes, joins, losses, and faults
that lead a new run the same way."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.elastic.faults import Fault
from holdfast.elastic.generation import Generation, Identity, Member
from holdfast.elastic.history import history_of, newest_start
from holdfast.parallel.errors import ConfigError

FOUNDERS = (0, 1, 2)


def plan(*ranks: int) -> dict[str, Any]:
    return {"stages": [[list(ranks)]], "spares": []}


def start(**more: Any) -> dict[str, Any]:
    begun = {"event": "generation", "generation": 1, "from_checkpoint": None}
    return {**begun, "plan": plan(*FOUNDERS), **more}


def worker(rank: int, node: str) -> dict[str, Any]:
    return {"event": "worker_started", "rank": rank, "node": node, "machine": f"of {node}"}


def change(step: int, *ranks: int, **more: Any) -> dict[str, Any]:
    """A change between two steps, by which nobody comes or goes unless `more` says so."""
    undisturbed = {"within_step": False, "committed": True, "filled": True}
    nobody = {"lost": [], "leaving": [], "joined": [], "from_checkpoint": None}
    told = {"event": "recovered", "generation": 2, "step": step, "plan": plan(*ranks)}
    return {**told, **undisturbed, **nobody, **more}


def test_the_newest_start_counts_and_lines_before_it_do_not() -> None:
    events = [start(), change(3, 0, 1, lost=[2]), start(from_checkpoint=8), change(9, 0, 2)]
    assert newest_start(events) == 2
    history = history_of(events)
    assert history.first_step == 8
    assert [c.step for c in history.changes] == [9]
    assert history.faults == ()
    assert newest_start(events[1:2]) is None


def test_nodes_have_the_ranks_that_took_part() -> None:
    workers = [worker(2, "b"), worker(0, "a"), worker(1, "a"), worker(7, "never-placed")]
    found = history_of([*workers, start(), worker(3, "b"), change(4, 0, 1, 2, 3, joined=[3])])
    assert found.nodes == {"a": (0, 1), "b": (2, 3)}
    assert found.machines == {"a": "of a", "b": "of b"}


def test_nodes_fail_alone_on_one_machine_and_with_their_machine_on_several() -> None:
    def domains(*machines: str) -> list[str]:
        nodes = ("a", "a", "b", "b")
        members = tuple(
            Member(Identity(rank), node, "h:1", 1, 0, "", False, machine=machine)
            for rank, (node, machine) in enumerate(zip(nodes, machines, strict=True))
        )
        return list(Generation(1, members).failure_domains.values())

    assert domains("m", "m", "m", "m") == ["a", "a", "b", "b"]
    assert domains("m", "m", "n", "n") == ["m", "m", "n", "n"]


def test_a_rank_is_awaited_before_the_step_at_which_it_joined() -> None:
    between = change(4, 0, 1, 2, 3, joined=[3])
    interrupting = change(6, 0, 1, 2, 3, within_step=True, committed=False, joined=[2])
    history = history_of([start(), between, interrupting])
    assert history.awaited(3) == {3}
    assert history.awaited(6) == {2}
    assert history.awaited(4) == frozenset()
    assert [step for step in range(9) if history.changes_after(step)] == [4]


@pytest.mark.parametrize(("committed", "step", "phase"), [(False, 6, "reduce"), (True, 5, "apply")])
def test_a_loss_is_a_kill_before_the_vote_of_its_step_or_after_it(
    committed: bool, step: int, phase: Any
) -> None:
    lost = change(5, 0, 1, within_step=True, committed=committed, lost=[2])
    assert history_of([start(), lost]).faults == (Fault("kill", 2, step, phase),)


def test_a_process_that_replaces_another_has_the_next_number() -> None:
    losses = (5, 9)
    events = [start()]
    for step in losses:
        events += [change(step, 0, 1, lost=[2]), change(step + 1, 0, 1, 2, joined=[2])]
    history = history_of(events)
    assert [fault.incarnation for fault in history.faults] == [0, 1]
    # The first replacement joins after step 5, the second after step 9, and there is no third.
    allowed = {
        n: [s for s in range(12) if history.may_start(2, n, s, founder=True)] for n in (1, 2)
    }
    assert (allowed[1][0], allowed[2][0]) == losses
    assert history.may_start(2, 0, 0, founder=True)
    assert not history.may_start(2, 3, 100, founder=True)


def test_state_has_arrived_and_ranks_leave_where_the_run_says_so() -> None:
    waiting = change(3, 0, 1, 2, filled=False)
    leaving = change(5, 0, 1, leaving=[2])
    undecided = change(7, 0, 1, within_step=True, committed=False)
    history = history_of([start(), waiting, leaving, undecided])
    assert [step for step in range(9) if history.filled_after(step)] == [5]
    assert [step for step in range(9) if history.leaves_after(2, step)] == [5]
    assert not any(history.leaves_after(1, step) for step in range(9))


def test_what_follows_a_return_to_a_checkpoint_is_not_repeated() -> None:
    events = [start(), change(4, 0, 1, lost=[2]), change(2, 0, from_checkpoint=2), change(6, 0)]
    history = history_of(events)
    assert [c.step for c in history.changes] == [4]
    assert history.last_step == 4
    assert history_of(events[:2]).last_step is None


@pytest.mark.parametrize(
    "wrong",
    [
        change(-1, 0),
        change(3, 0, lost="2"),
        change(3, 0, within_step=1),
        {k: v for k, v in change(3, 0).items() if k != "joined"},
        change(3, 0) | {"plan": {"stages": 7, "spares": []}},
    ],
    ids=["negative", "text", "number", "absent", "plan"],
)
def test_a_line_that_no_run_writes_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not as a run writes it") as told:
        history_of([start(), wrong])
    assert "\n" not in str(told.value)


def test_a_run_without_generations_has_nothing_to_repeat() -> None:
    with pytest.raises(ConfigError, match="was not an elastic one"):
        history_of([{"event": "run_finished"}])
