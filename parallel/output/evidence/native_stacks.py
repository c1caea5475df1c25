"""The native stacks of a process, as a debugger that is installed prints them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

_MOST_CHARACTERS = 1 << 16


def native_stacks(pid: int, seconds: float) -> tuple[str, str]:
    """The stacks of all threads of a process, and a note if there are none.

    The process stands still meanwhile. py-spy is asked if it is installed, or else gdb.

    Args:
        seconds: after which the debugger is ended, and the process goes on.
    """
    command = _command(pid)
    if not command:
        return "", "no native stacks: neither py-spy nor gdb is installed"
    name = Path(command[0]).name
    try:
        debugger = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return "", f"no native stacks: {name} cannot be started: {error.strerror or error}"
    try:
        text, _ = debugger.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(debugger.pid, signal.SIGKILL)
        debugger.communicate()
        return "", f"no native stacks: {name} took longer than {seconds:.1f} s"
    if debugger.returncode:
        said = " ".join(text.split())[:200]
        return "", f"no native stacks: {name} ended with code {debugger.returncode}: {said}"
    return text[:_MOST_CHARACTERS], ""


def _command(pid: int) -> list[str]:
    beside = Path(sys.executable).parent
    spy = shutil.which("py-spy", path=f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if spy is not None:
        return [spy, "dump", "--pid", str(pid), "--native"]
    if (gdb := shutil.which("gdb")) is not None:
        asked = ["set debuginfod enabled off", "thread apply all backtrace 24"]
        given = [word for text in asked for word in ("-ex", text)]
        return [gdb, "-nx", "-batch", "-p", str(pid), *given]
    return []
