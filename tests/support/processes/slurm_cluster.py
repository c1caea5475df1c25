"""A real Slurm on this machine: its controller, and several daemons that each play a node."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")
_UP_S = 30.0


@dataclass(frozen=True)
class Slurm:
    """A running Slurm."""

    folder: Path
    nodes: int

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def lose(self, node: int) -> None:
        """Have the controller take a node for lost."""
        down = ("update", f"nodename=node{node}", "state=down", "reason=test")
        subprocess.run(["scontrol", *down], env={**os.environ, **self.environment}, check=True)

    def idle(self) -> int:
        """Nodes that are ready for work."""
        command = ["sinfo", "--noheader", "--Node", "--states=idle"]
        found = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True
        )
        return len(found.stdout.splitlines())


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _configuration(folder: Path, nodes: int) -> str:
    host = socket.gethostname()
    controller, *ports = _free_ports(nodes + 1)
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        f"AuthInfo=socket={folder}/munge.socket",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        "ProctrackType=proctrack/pgid",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "ReturnToService=2",
        "SlurmdParameters=config_overrides",
    ]
    lines += [
        f"NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4"
        for n, port in enumerate(ports)
    ]
    return "\n".join([*lines, "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE", ""])


@contextmanager
def slurm(nodes: int) -> Iterator[Slurm]:
    """A Slurm of so many nodes; the test is skipped where none can be started.

    It has a folder of its own, because the names of its sockets are long, and those of a test's
    folder may be: the system allows 107 bytes for both.
    """
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"Slurm's daemons need root and {', '.join(_PROGRAMS)}: "
            "apt-get install slurmctld slurmd slurm-client munge"
        )
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        yield from _started(Path(folder), nodes)


def _started(folder: Path, nodes: int) -> Iterator[Slurm]:
    """Start the daemons, yield, and end them."""
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder, nodes))
    commands = [
        [
            *("munged", "--foreground", "--force", f"--socket={folder}/munge.socket"),
            *(f"--key-file={folder}/munge.key", f"--pid-file={folder}/munge.pid"),
            *(f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"),
        ],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", f"node{n}"] for n in range(nodes)),
    ]
    running = Slurm(folder, nodes)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"daemon-{number}.txt").open("wb") as output:
                daemons.append(
                    subprocess.Popen(
                        command,
                        stdout=output,
                        stderr=output,
                        env={**os.environ, **running.environment},
                    )
                )
            time.sleep(0.3)
        deadline = time.monotonic() + _UP_S
        while running.idle() < nodes:
            if time.monotonic() > deadline:
                said = "".join(p.read_text()[-300:] for p in sorted(folder.glob("daemon-*.txt")))
                pytest.skip(f"Slurm does not come up here: {said}")
            time.sleep(0.1)
        yield running
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
