"""The `holdfast` command in processes forked from one that has imported it.

A run in a test is otherwise one third importing torch. What happens after the imports is what the
command does; that it starts by itself is what tests/launch and the documentation's tests see.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    ["support.runs.elastic_demo", "holdfast.launch.commands.training", "holdfast.trainer.worker"]
)
_TESTS = str(Path(__file__).resolve().parents[2])


def forked(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process to start, forked from one with the imports of the command and of elastic_demo.

    That one imports before it is told pytest's paths, and passes over what it does not find.
    """
    with mock.patch.dict(os.environ, PYTHONPATH=_TESTS):
        forkserver.ensure_running()
    return _FORK.Process(target=target, args=arguments)


class ForkedCommand:
    """One command under way, with what `subprocess.Popen` has of it."""

    def __init__(
        self,
        arguments: Sequence[str],
        output: Path,
        environment: Mapping[str, str],
        *,
        before: str = "",
        folder: Path | None = None,
        errors: Path | None = None,
    ) -> None:
        """Start `holdfast ARGUMENTS`; what it prints goes to the file `output`.

        Args:
            before: `module:function`, which its process calls first.
            folder: the one in which it runs; None: that of the tests.
            errors: the file for its standard error, if that is another one.
        """
        self._output = output
        printed = (str(output), str(errors or output))
        where = str(folder or Path.cwd())
        self._process = forked(_run, list(arguments), where, printed, dict(environment), before)
        self._process.start()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def printed(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("holdfast", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    arguments: list[str],
    folder: str,
    printed: tuple[str, str],
    environment: dict[str, str],
    before: str,
) -> None:
    from holdfast.launch.cli import main

    if before:
        module, name = before.split(":")
        getattr(importlib.import_module(module), name)()
    for stream, file in enumerate(printed, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["holdfast", *arguments]
    # A command that wants another heap starts itself again, by what it was started with.
    sys.orig_argv = [sys.executable, "-m", "holdfast.launch.cli", *arguments]
    main()
