"""The `holdfast` command, and programs that use it or start it, in processes forked from one that
has imported it.

A run in a test is otherwise one third importing torch. What happens after the imports is what the
command does; that it starts by itself is what tests/launch sees.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from support.network.namespaces import enter_network
from support.processes.preloaded import COMMANDS, TRAINING

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["support.runs.elastic_demo", *TRAINING, *COMMANDS])
_STARTING = threading.Lock()
_TESTS = str(Path(__file__).resolve().parents[2])
_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect({address!r})
    asked = [os.getpid(), os.getcwd(), sys.argv, dict(os.environ)]
    connection.send(json.dumps(asked).encode())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: connection.send(str(int(number)).encode()))
    code = int(connection.recv(16))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
_MOST_ASKED = 1 << 17
"""Bytes of a client's arguments and environment."""
_PYTHON = "forked-python"
_PROGRAMS = {"holdfast": "", "torchrun": "torch.distributed.run", _PYTHON: ""}
"""The modules that programs for shells run; Python is asked for one as `[-u] -m MODULE`."""


def forked(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process to start, forked from one with the imports of the command and of elastic_demo.

    That one imports before it is told pytest's paths, and passes over what it does not find.
    """
    with _STARTING, mock.patch.dict(os.environ, PYTHONPATH=_TESTS):
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
        script: Path | None = None,
        module: str = "",
        network: str = "",
    ) -> None:
        """Start `holdfast ARGUMENTS`; what it prints goes to the file `output`.

        Args:
            script: a program of Python that is run instead of `holdfast`.
            module: one that is run as `python -m MODULE` instead.
            before: `module:function`, which its process calls first.
            folder: the one in which it runs; None: that of the tests.
            errors: the file for its standard error, if that is another one.
            network: the network namespace in which it runs.
        """
        self._output = output
        printed = (str(output), str(errors or output))
        command = ["" if script is None else str(script), module, *arguments]
        where = str(folder or Path.cwd()), network
        self._process = forked(_run, command, where, printed, dict(environment), before)
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


@contextmanager
def forked_for_shells(folder: Path, script: Path | None = None) -> Iterator[Path]:
    """A folder for PATH in which `holdfast` and `torchrun` are forked as `ForkedCommand` is, and
    workers of that `torchrun`; they have no input.

    A program ends as its process does, passes signals on to it, and takes it along when it is
    killed.

    Args:
        script: a program of Python that is run instead of `holdfast`.
    """
    folder.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen()
        for name in _PROGRAMS:
            client = folder / name
            client.write_text(_CLIENT.format(python=sys.executable, address=str(folder / "socket")))
            client.chmod(0o755)
        serve = threading.Thread(target=_serve_shells, args=(listening, script), daemon=True)
        serve.start()
        try:
            yield folder
        finally:
            listening.shutdown(socket.SHUT_RDWR)


def _serve_shells(listening: socket.socket, script: Path | None) -> None:
    """Run what clients ask for, until no more can come."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=_serve_client, args=(connection, script), daemon=True).start()


def _serve_client(connection: socket.socket, script: Path | None) -> None:
    """Run one command, which prints to where its client does, and send its exit code."""
    with connection:
        pid, folder, (program, *arguments), environment = json.loads(connection.recv(_MOST_ASKED))
        client = Path(program)
        module = _PROGRAMS[client.name]
        if client.name == _PYTHON:
            _, module, *arguments = arguments[arguments[0] == "-u" :]
        environment["PYTHON_EXEC"] = str(client.with_name(_PYTHON))  # of torchrun's workers
        output, errors = (Path(f"/proc/{pid}/fd/{number}") for number in (1, 2))
        command = ForkedCommand(
            arguments,
            output,
            environment,
            folder=Path(folder),
            errors=errors,
            script=None if module else script,
            module=module,
        )
        ended = threading.Event()
        heeded = connection, command.pid, ended
        heed = threading.Thread(target=_pass_signals, args=heeded, daemon=True)
        heed.start()
        code = command.wait()
        ended.set()
        with suppress(OSError):  # its client may have been killed
            connection.send(str(code).encode())
        heed.join()


def _pass_signals(connection: socket.socket, pid: int, ended: threading.Event) -> None:
    """Send a command the signals that its client gets, and kill it once its client is gone.

    Args:
        ended: set when the command has ended: another process may have its number then.
    """
    with suppress(OSError):
        while told := connection.recv(16):
            if not ended.is_set():
                os.kill(pid, int(told))
    if not ended.is_set():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _run(
    command: list[str],
    where: tuple[str, str],
    printed: tuple[str, str],
    environment: dict[str, str],
    before: str,
) -> None:
    from holdfast.launch.cli import main

    script, module, *arguments = command
    folder, network = where
    if network:
        enter_network(network)
    if before:
        place, name = before.split(":")
        getattr(importlib.import_module(place), name)()
    for stream, file in enumerate(printed, start=1):
        fresh = 0 if file.startswith("/proc/") else os.O_TRUNC  # a client's file may have others'
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | fresh, 0o644)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # What wants another heap starts itself again, by what it was started with.
    if script:
        sys.argv = [script, *arguments]
        sys.orig_argv = [sys.executable, *sys.argv]
        sys.path.insert(0, folder)
        runpy.run_path(script, run_name="__main__")
        return
    if module not in ("", "holdfast.launch.cli"):
        sys.argv = [module, *arguments]
        sys.orig_argv = [sys.executable, "-m", module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.argv = ["holdfast", *arguments]
    sys.orig_argv = [sys.executable, "-m", "holdfast.launch.cli", *arguments]
    main()
