"""A command is one module and one line: it runs, is listed, and imports nothing of the others."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest import mock

import pytest
import typer
from typer.testing import CliRunner

from holdfast.launch import cli


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that adds a command, as a file in launch/commands would be."""

    def register(app: typer.Typer) -> None:
        @app.command()
        def echo(word: str) -> None:
            """Say a word again."""
            typer.echo(word * 2)

    module = ModuleType("holdfast.launch.commands.echo")
    monkeypatch.setattr(module, "register", register, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.application(arguments[0]), arguments)
    return done.exit_code, done.output


def test_a_registered_command_runs_and_is_listed(echo: None) -> None:
    assert run("echo", "ab")[0] == 2, "a name without its line is no command"
    with mock.patch.dict(cli.COMMANDS, echo="echo"):  # type: ignore[arg-type]
        assert run("echo", "ab") == (0, "abab\n")
        code, listed = run("--help")
    assert code == 0
    assert "Say a word again." in listed


def test_every_registered_command_is_added_by_its_module() -> None:
    for command, module in cli.COMMANDS.items():
        names = typer.main.get_command(cli.application(command)).commands  # type: ignore[attr-defined]
        assert command in names, f"launch/commands/{module}.py does not add {command}"
