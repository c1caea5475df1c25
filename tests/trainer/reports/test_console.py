"""The table of a layout says who holds what, however losses have scattered the ranks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from holdfast.parallel.plan import Plan, replan
from holdfast.parallel.plan.replan import Roster
from holdfast.trainer.reports.console import Display, layout_grid
from support.runs.plans import NODES, first_plan


def shown(plan: Plan) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as capture:
        console.print(layout_grid(plan))
    return capture.get()


def test_a_stage_replica_is_shown_with_what_divides_it() -> None:
    whole = shown(first_plan(tensor=2, data=2, pipeline=1))
    assert whole.startswith(" tensor 2 ")
    assert "ranks 0-1" in whole
    assert "ranks 2-3" in whole
    alone = shown(first_plan(data=2, pipeline=1))
    assert "tensor" not in alone
    assert "■ rank 1" in alone


def test_ranks_that_do_not_follow_one_another_are_not_shown_as_a_range() -> None:
    plan = first_plan(tensor=2, data=2, pipeline=1)
    formed = replan(plan, Roster((0, 3), NODES), generation=1)
    assert formed.stage_replicas.stages == (((0, 3),),)
    assert "ranks 0,3" in shown(formed)
    wider = first_plan(tensor=4, data=2, pipeline=1)
    mixed = replan(wider, Roster((0, 1, 2, 7), NODES), generation=1)
    assert "ranks 0-2,7" in shown(mixed)


def test_the_name_of_a_run_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("x[/red]\x1b[31m", first_plan(data=2, pipeline=1), every=1)
    display.start()
    display.note("its folder is a[/b]\x1b[31m")
    display.finish([("run", "runs/x[/red]\x1b[31m")])
    out = capsys.readouterr().out
    assert out.count(r"x[/red]\x1b[31m") == 3
    assert r"a[/b]\x1b[31m" in out
    assert "\x1b" not in out
