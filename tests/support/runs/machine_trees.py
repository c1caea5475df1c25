"""The kernel's trees of a machine, as folders of files."""

from __future__ import annotations

import sys
from pathlib import Path

from holdfast.launch.machine_errors.roots import MachineRoots


class MachineTree:
    """A machine whose kernel tells what a test writes."""

    def __init__(self, folder: Path) -> None:
        self.roots = MachineRoots.below(folder)
        self.write_proc("pressure/memory", "")
        self.roots.kernel_messages.parent.mkdir(parents=True, exist_ok=True)
        self.roots.kernel_messages.touch()

    def count(self, path: str, number: int) -> None:
        """Have a counter below /sys stand at a number."""
        self.write(path, str(number))

    def write(self, path: str, text: str) -> None:
        _write(self.roots.sys / path, text)

    def write_proc(self, path: str, text: str) -> None:
        _write(self.roots.proc / path, text)

    def say(self, message: str) -> None:
        """Have the kernel log a message."""
        with self.roots.kernel_messages.open("a") as log:
            log.write(message)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(f"{text}\n")
    fresh.replace(path)


def train_with_tree() -> int:
    """A run on this machine whose kernel's trees lie in a folder: CONFIG, RUN, FOLDER."""
    from holdfast.launch.launchers import run_elastic
    from holdfast.trainer.run import RunRequest, load_run_config, opened_run

    config, root, folder = (Path(argument) for argument in sys.argv[1:4])
    loaded = load_run_config(config, [])
    with opened_run(RunRequest(config, loaded, root)) as opened:
        return run_elastic(opened.config, opened.directory, MachineRoots.below(folder))
