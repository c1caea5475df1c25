"""Names from outside are shown as they are: they neither steer the terminal nor are markup."""

from __future__ import annotations

import ast

import pytest

from holdfast.parallel.output import plain_console, say
from support.source_tree import MODULES, tree_of

NAME = "runs/x[/red] [bold]y :smile: \x1b[31m\x07\udcff"
SHOWN = r"runs/x[/red] [bold]y :smile: \x1b[31m\x07\udcff"


def test_a_line_shows_what_would_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(NAME)
    assert capsys.readouterr().out == SHOWN + "\n"


def test_a_console_takes_no_name_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print(SHOWN, soft_wrap=True)
    assert capsys.readouterr().out == SHOWN + "\n"


def test_nothing_is_printed_in_another_way() -> None:
    found = {
        f"{module}:{node.lineno}: {ast.unparse(node.func)}"
        for module, path in MODULES.items()
        if module != "holdfast.parallel.output.terminal"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("typer.echo", "typer.secho", "Console", "print")
        and not module.endswith(".throughput_probe")  # which prints for its parent alone
    }
    assert found == set()
