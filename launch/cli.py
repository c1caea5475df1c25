"""The `holdfast` command.

A command imports only what it needs; only commands that compute import torch. A shell that
completes a command line imports no more.
"""

from __future__ import annotations

import sys

try:
    import os
    import signal
    from collections.abc import Mapping, Sequence
    from importlib import import_module
    from typing import Annotated, Any, Final, NoReturn

    import typer

    from holdfast.launch.help_pages import epilog, shown_alone, tidy
    from holdfast.parallel.errors import Unanswered
    from holdfast.parallel.output import (
        begin_process,
        exit_code_of,
        leave,
        say,
        stream_error,
        tell,
        unwind_when_told,
    )
    from holdfast.parallel.reading import require_text_names
except KeyboardInterrupt:  # as in the command itself, and as early as can be
    sys.exit(130)

COMMANDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("train", "resume", "replay", "join", "plan", "check", "data"), "training"),
    "chaos": "chaos",
    "rewind": "rewind",
    "report": "report",
    "health": "health",
    **dict.fromkeys(("inspect", "verify", "diff", "prove"), "checkpoints"),
    **dict.fromkeys(("bisect", "audit"), "comparisons"),
    "convert": "convert",
    "generate": "text",
    "evaluate": "evaluation",
}
"""By the name of a command, the module of launch.commands whose `register` adds it."""
RECORDED: Final = ("train", "resume", "replay", "join")
"""The commands whose results are files: output that is lost does not change their exit code."""
ANSWERING: Final = ("verify", "diff", "prove", "bisect", "audit", "health", "rewind")
"""The commands whose exit code 1 is an answer: damaged, different, not proved, not confirmed, sick,
not taken back."""
ONCE_A_FLAG: Final = "--allow-change"
COMPLETION: Final = "_HOLDFAST_COMPLETE"
"""The environment variable by which a shell asks for completions of a command line."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(version("holdfast"))
        raise typer.Exit


def options(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of the command itself."""
    shown_alone(context)


def application(command: str) -> typer.Typer:
    """The application with this command, or with all commands if there is no such one."""
    app = typer.Typer(
        name="holdfast",
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Pretrain language models over many machines, in any layout, with the same bits.",
        epilog=epilog("holdfast"),
    )
    app.callback()(options)
    for module in [COMMANDS[command]] if command in COMMANDS else dict.fromkeys(COMMANDS.values()):
        import_module(f"holdfast.launch.commands.{module}").register(app)
    return app


def command_line(command: str) -> Any:
    """The parser of the command line, of typer's own kind, with help pages as people read them."""
    parser = typer.main.get_command(application(command))
    tidy(parser)
    return parser


def _command_name() -> str:
    """The name of the command that is run, or whose options a shell completes."""
    words = sys.argv
    if COMPLETION in os.environ:
        line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
        words = line.split()
    return words[1] if len(words) > 1 else ""


def _with_bare_option(words: Sequence[str]) -> list[str]:
    """The arguments, with an empty value for an option that was once a flag. Pure.

    So the command can say which value it needs, where the parser would take the next option for it.
    """
    given = list(words)
    return [
        f"{word}=" if word == ONCE_A_FLAG and (not after or after.startswith("-")) else word
        for word, after in zip(given, [*given[1:], ""], strict=True)
    ]


def _run() -> int:
    require_text_names(sys.argv[1:], os.environ)
    command = _command_name()
    if command not in RECORDED:  # those hear signals in their own ways
        unwind_when_told()
    try:
        command_line(command)(args=_with_bare_option(sys.argv[1:]), prog_name="holdfast")
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        return end.code
    return 0


def main() -> NoReturn:
    """Run the command; an error is one line and an exit code, never a traceback."""
    begin_process()
    code = exit_code_of(_run)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from now on one ends what is left at once
    command = _command_name()
    if (reason := stream_error()) and not code and command not in RECORDED:
        tell(f"holdfast: the output cannot be written: {reason}")
        code = Unanswered.exit_code if command in ANSWERING else 1
    leave(code)


if __name__ == "__main__":
    main()
