"""What a run shows: the table of a layout, lines that stay, a panel, and a summary."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import pytest

from holdfast.parallel.output import plain_text
from holdfast.parallel.plan import Plan, replan
from holdfast.parallel.plan.replan import Roster
from holdfast.trainer.config import convert_config
from holdfast.trainer.reports.metrics import StepMetrics
from holdfast.trainer.reports.run_console import RunConsole
from holdfast.trainer.reports.terminal.console import Display, ProgressLine
from holdfast.trainer.reports.terminal.layout_table import LayoutTable
from holdfast.trainer.run import RunDirectory
from support.processes.terminal import OnTerminal
from support.runs.plans import NODES, first_plan

STAMP = r"\d\d:\d\d:\d\d "


def shown(plan: Plan, width: int = 100) -> str:
    return plain_text(LayoutTable(plan), width=width)


def test_a_stage_replica_is_shown_with_what_divides_it() -> None:
    whole = shown(first_plan(tensor=2, data=2, pipeline=1))
    assert whole.startswith(" tensor 2 ")
    assert "ranks 0-1" in whole
    assert "ranks 2-3" in whole
    alone = shown(first_plan(data=2, pipeline=1))
    assert "tensor" not in alone
    assert "■ rank 1" in alone


def test_a_smaller_stage_replica_is_marked_and_its_degrees_are_said() -> None:
    plan = first_plan(tensor=2, data=2, pipeline=1)
    mesh = replace(plan.configured_mesh, tensor_shards=2)
    plan = replan(plan.evolved(configured_mesh=mesh), Roster((0, 1, 3), NODES), generation=1)
    for width in (100, 30):
        text = " ".join(shown(plan, width).split())
        assert "◧ rank 3: tensor 1 (2 shards)" in text
        assert "ranks 0-1" in text
    assert "micro-batches of a step 6 2" in " ".join(shown(plan).split())


def test_ranks_that_do_not_follow_one_another_are_not_shown_as_a_range() -> None:
    plan = first_plan(tensor=2, data=2, pipeline=1)
    formed = replan(plan, Roster((0, 3), NODES), generation=1)
    assert formed.stage_replicas.stages == (((0, 3),),)
    assert "ranks 0,3" in shown(formed)
    wider = first_plan(tensor=4, data=2, pipeline=1)
    mixed = replan(wider, Roster((0, 1, 2, 7), NODES), generation=1)
    assert "ranks 0-2,7" in shown(mixed)
    assert "ranks 0-2, 7" in " ".join(shown(mixed, 30).split())


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize(("tensor", "data", "pipeline"), [(1, 2, 2), (2, 8, 1), (4, 4, 4)])
def test_every_rank_can_be_found_and_no_word_is_cut(
    width: int, tensor: int, data: int, pipeline: int
) -> None:
    text = shown(first_plan(tensor=tensor, data=data, pipeline=pipeline), width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    joined = " ".join(text.split())
    found: set[int] = set()
    for runs in re.findall(r"ranks? (\d[\d,-]*)", joined):
        for run in runs.split(","):
            first, _, last = run.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    assert found == set(range(tensor * data * pipeline))
    assert [f"stage {stage}:" in joined for stage in range(pipeline + 1)] == [True] * pipeline + [
        False
    ]
    assert "layers 0-" in joined
    assert "head" in joined


def test_the_name_of_a_run_is_shown_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan, log = first_plan(data=2, pipeline=1), tmp_path / "console.log"
    display = Display("x[/red]\x1b[31m", plan, every=1, log=log)
    display.start()
    display.note("its folder is a[/b]\x1b[31m")
    sys.stderr.write("a warning\x1b[31m\n")
    display.finish([("run", "runs/x[/red]\x1b[31m")])
    out, errors = capsys.readouterr()
    assert errors == "a warning\\x1b[31m\n"
    for text in (out, log.read_text()):
        assert text.count(r"x[/red]\x1b[31m") == 3
        assert r"a[/b]\x1b[31m" in text
        assert "\x1b" not in text
    assert re.match(STAMP, out)
    kept = re.sub(r"(?m)^\d{4}-\d\d-\d\d ", "", log.read_text())
    assert kept.replace("a warning", "") != kept, "what is told on standard error is kept as well"


def progress(step: int, **evaluated: float) -> ProgressLine:
    return ProgressLine(step, 1000, 2.5, 1.25, 3e-4, 12345.0, 100.0, 0.25, evaluated, None)


def test_lines_of_steps_have_their_numbers_in_the_same_columns() -> None:
    first, later = progress(1).line(), progress(1000).line()
    assert "memory  0.25 GiB" in first
    assert len(first) == len(later)
    assert first.replace("step    1/", "step 1000/") == later
    evaluated = progress(1, held_out=2.25, code=1.5).line()
    assert evaluated == f"{first}  held-out loss 2.2500  code loss 1.5000"


def on_a_terminal(plan: Plan, log: Path) -> OnTerminal:
    """A display in a child: "note TEXT", "error TEXT" and "step N" show something."""

    def body(lines: TextIO) -> None:
        display = Display("run", plan, every=10, log=log, environment={}, clock=lambda: 0.0)
        display.start()
        for line in lines:
            what, _, value = line.strip().partition(" ")
            if what == "step":
                display.show(progress(int(value), **({"held_out": 2.25} if value == "25" else {})))
            elif what == "error":
                sys.stderr.write(f"{value}\n")
            else:
                display.note(value)
        display.close()

    return OnTerminal(body, columns=100, rows=24)


@pytest.mark.mp
def test_a_terminal_keeps_the_story_above_the_panel_whatever_its_size(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    on = on_a_terminal(first_plan(tensor=2, data=2, pipeline=2), log)
    sizes = [(100, 24), (90, 30), (50, 30), (44, 50), (120, 24), (60, 40)]
    for number, (columns, rows) in enumerate(sizes):
        on.resize(columns, rows)
        on.tell(f"note checkpoint of step {number}")
        on.tell(f"step {10 * number + 5}")
        on.tell(f"error a warning {number}")

        def is_shown(lines: list[str], number: int = number) -> bool:
            return any(f"a warning {number}" in line for line in lines) and lines[-1][:1] == "╰"

        on.show_until(is_shown)
        lines = on.screen.lines
        drawn = [line[0] for line in lines if line[:1] in ("╭", "╰")]
        assert drawn == ["╭", "╰"], "\n".join(lines)
        panel = "\n".join(lines[lines.index(next(x for x in lines if x[:1] == "╭")) :])
        for what in ("loss", "held-out", "lr", "ranks", "elapsed", "left"):
            assert what in panel
    assert on.end() == 0
    lines = on.screen.lines
    assert not [line for line in lines if line[:1] in "╭│╰"]
    told = [re.sub(STAMP, "", line) for line in lines if line]
    expected = []
    for number in range(len(sizes)):
        expected.append(f"checkpoint of step {number}")
        if number == 2:
            expected.append(progress(25, held_out=2.25).line())
        expected.append(f"a warning {number}")
    expected.append(progress(55).line())
    assert told == expected, "each line once, and the last step"
    kept = re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", log.read_text())
    assert [line for line in kept.splitlines() if line in expected] == expected
    assert "\x1b" not in kept


@pytest.mark.mp
@pytest.mark.parametrize(
    ("environment", "live"),
    [({}, False), ({"TTY_INTERACTIVE": "1"}, True)],
    ids=["of its own", "asked for"],
)
def test_a_terminal_of_a_launcher_gets_no_escapes_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], live: bool
) -> None:
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def body(lines: TextIO) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        plan, log = first_plan(data=2, pipeline=1), tmp_path / "console.log"
        display = Display("r", plan, every=1, log=log, launched=True, environment=environment)
        display.start()
        for _ in lines:
            display.show(progress(1))
        display.close()

    on = OnTerminal(body, columns=100, rows=24)
    fed: list[str] = []
    feed = on.screen.feed
    monkeypatch.setattr(on.screen, "feed", lambda text: (fed.append(text), feed(text)))
    on.tell("go")
    on.show_until(lambda lines: any("loss" in line for line in lines))
    assert on.end() == 0
    assert ("\x1b" in "".join(fed)) == live


def metrics(step: int) -> StepMetrics:
    evaluated = {"held_out": 2.75, "code": 1.5} if step == 10 else {}
    numbers = (1e-3, 100 * step, 0.5, 200.0, 2, 1)
    return StepMetrics(step, 3.0, "", 1.0, "", *numbers, validation=evaluated)


def test_a_summary_tells_the_steps_made_now_and_what_was_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = convert_config(
        {
            "model": {"family": "llama", "layers": 1, "hidden": 8, "heads": 1, "vocab": 8,
                      "intermediate": 8, "kv_heads": 1},
            "train": {"steps": 10},
        }
    )  # fmt: skip

    def summary(steps: range, *, lost: bool = False) -> dict[str, str]:
        console = RunConsole(RunDirectory(tmp_path), config, first_plan(data=2, pipeline=1))
        for step in steps:
            console.step(metrics(step), memory_gib=None, mfu=None)
        if lost:
            console.recovered([1, 2], repeated=3)
        capsys.readouterr()
        console.finish("ab" * 32, 61.0)
        rows = re.findall(r"│ +(\S.*?)  +(\S.*?) +│", capsys.readouterr().out)
        return dict(rows)

    whole = summary(range(1, 11))
    assert whole["steps"] == "10 in 1:01"
    assert whole["speed"] == "200 tokens/s (median step)"
    part = summary(range(8, 11), lost=True)
    assert part["steps"] == "10, of which 3 now, in 1:01"
    assert (part["held-out loss"], part["code loss"]) == ("2.7500", "1.5000")
    assert part["lost"] == "2 ranks; recoveries: 1; steps repeated: 3"
    none = summary(range(0))
    assert none["steps"] == "10, all made before"
    assert "loss" not in none
    assert "speed" not in none
