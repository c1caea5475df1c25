"""What a person reads who asks how to use the command, and what a shell completes."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from holdfast.launch import cli
from holdfast.launch.help_pages import EXAMPLES

PARSER = cli.command_line("")


@pytest.fixture
def shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a command line prints, which ends with exit code 0."""

    def show(*arguments: str) -> str:
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            PARSER(list(arguments), prog_name="holdfast")
        assert not end.value.code
        return capsys.readouterr().out

    return show


def pages() -> list[str]:
    """The commands that have a help page of their own."""
    found = []
    for name, command in PARSER.commands.items():
        found += [f"{name} {below}" for below in getattr(command, "commands", {})] or [name]
    return found


@pytest.mark.parametrize("page", pages())
def test_a_help_page_has_examples_and_no_type_of_a_flag(
    page: str, shown: Callable[..., str]
) -> None:
    text = shown(*page.split(), "-h")
    assert text == shown(*page.split(), "--help")
    assert all(line in text for line in EXAMPLES[page])
    assert "<bool>" not in text
    for empty in ("default: 0]", "default: 0.0]", "default: -1]", "default: None]", "default: ]"):
        assert empty not in text


def test_the_command_alone_shows_its_help_and_its_groups_do(shown: Callable[..., str]) -> None:
    alone = shown()
    assert alone.strip() == shown("-h").strip() == shown("--help").strip()
    assert "Pretrain language models" in alone
    assert "--install-completion" in alone
    assert "prepare" in shown("data")
    assert shown("-V") == shown("--version")
    assert EXAMPLES.keys() == {*pages(), "holdfast"}


@pytest.mark.parametrize(
    "line", [line for lines in EXAMPLES.values() for line in lines if line.startswith("holdfast")]
)
def test_an_example_is_a_command_line_that_is_understood(line: str) -> None:
    """Unknown options, missing arguments and values of a wrong type would raise."""
    command, words = PARSER, shlex.split(line)[1:]
    context = None
    while hasattr(command, "commands"):
        context = command.make_context("holdfast", [], parent=context, resilient_parsing=True)
        command, *words = command.commands[words[0]], *words[1:]
    command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("holdfast tr", ["train"]),
        ("holdfast train run.toml --np", ["--nproc"]),
        ("holdfast plan run.toml --set model.hi", ["model.hidden="]),
        ("holdfast chaos run --fault sl", ["slow", "slow-compute"]),
        ("holdfast convert a b --to dc", ["dcp"]),
        ("holdfast train - --np", ["--nproc"]),
    ],
)
def test_a_shell_completes_commands_options_and_keys(
    line: str, offered: list[str], shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cli.COMPLETION, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    assert shown().split() == offered


def test_completion_imports_only_the_command_that_is_completed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["holdfast"])
    monkeypatch.setenv(cli.COMPLETION, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "holdfast chaos run --fa")
    assert cli._command_name() == "chaos"
    monkeypatch.delenv("COMP_WORDS")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "holdfast convert ")
    assert cli._command_name() == "convert"
