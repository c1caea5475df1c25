"""What a run is started with and on: versions, the processor, GPUs, the commit of the user's code.

A result that cannot be explained later is traced by these.
"""

from __future__ import annotations

import contextlib
import platform
import re
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from holdfast.parallel.reading import read_regular
from holdfast.trainer.config import machine_memory_bytes
from holdfast.trainer.run import this_machine

_MOST_BYTES = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def start_facts(device: torch.device) -> dict[str, Any]:
    """The facts of this process's machine and folder, as JSON values. Local."""
    return {
        "holdfast": version("holdfast"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": this_machine().cores,
        "memory_bytes": machine_memory_bytes(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "commit": commit_of(Path.cwd()),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in read_regular(Path("/proc/cpuinfo"), _MOST_BYTES).decode().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out where a folder lies; None outside a git repository. Local.

    git itself is not started: it may be missing, and refuses other users' repositories.
    """
    for place in (folder, *folder.parents):
        git = place / ".git"
        with contextlib.suppress(OSError, ValueError):
            if git.is_file():  # a worktree or submodule
                git = place / _text(git).removeprefix("gitdir: ")
            if not git.is_dir():
                continue
            head = _text(git / "HEAD")
            name = head.removeprefix("ref: ")
            commit = head if name == head else _commit_named(git, name)
            return commit if commit and _COMMIT.fullmatch(commit) else None
    return None


def _commit_named(git: Path, name: str) -> str | None:
    """The commit of a branch, in a file of its own or among the packed ones."""
    with contextlib.suppress(OSError):
        git = git / _text(git / "commondir")
    with contextlib.suppress(OSError):
        return _text(git / name)
    for line in _text(git / "packed-refs").splitlines():
        if line.endswith(f" {name}"):
            return line.partition(" ")[0]
    return None


def _text(path: Path) -> str:
    return read_regular(path, _MOST_BYTES).decode().strip()
