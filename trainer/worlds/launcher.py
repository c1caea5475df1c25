"""The definition of a launcher: how it is recognised, and how a world is read. Pure."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.worlds.world import WorldInfo


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment variables of a process that a launcher has started."""

    variables: Mapping[str, str]
    launcher: str
    """The launcher's name and the recognised variable, for messages."""

    def text(self, *names: str, default: str = "") -> str:
        """The first of these variables that is set and not empty."""
        return next((found for name in names if (found := self.variables.get(name))), default)

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of these variables that is set, as a whole number.

        Raises:
            ConfigError: no variable is set and there is no default, or its value does not begin
                with a number.
        """
        name = next((name for name in names if name in self.variables), None)
        if name is None:
            if default is not None:
                return default
            raise ConfigError(
                f"{self.launcher}, but {' or '.join(names)} is not set; the launcher should set it"
            )
        try:
            return int(self.variables[name])
        except ValueError:
            raise ConfigError(
                f"{self.launcher}, but {name} = {self.variables[name]!r} is not a number; the "
                "launcher should set it"
            ) from None

    def port(self, default: int) -> int:
        """MASTER_PORT, where the workers meet.

        Raises:
            ConfigError: it is no number of a port.
        """
        found = self.number("MASTER_PORT", default=default)
        if not 0 <= found < 1 << 16:
            raise ConfigError(
                f"{self.launcher}, but MASTER_PORT = {found} is no port: ports are 0 to 65535"
            )
        return found


@dataclass(frozen=True, slots=True)
class Launcher:
    """A kind of launcher: torchrun, Slurm, an MPI."""

    name: str
    """The name that people use."""
    marks: tuple[str, ...]
    """Variables that are all set in processes of this launcher, and nowhere else."""
    read: Callable[[Environment], WorldInfo]

    def recognises(self, variables: Mapping[str, str]) -> bool:
        """Whether this launcher has started a process with these environment variables."""
        return all(name in variables for name in self.marks)

    def world(self, variables: Mapping[str, str]) -> WorldInfo:
        """The world in these environment variables.

        Raises:
            ConfigError: a variable is missing or not a number; the message names the launcher and
                the variable.
        """
        found = f"the environment is that of {self.name} ({', '.join(self.marks)})"
        world = self.read(Environment(variables, found))
        if not 0 <= world.rank < world.world_size:
            raise ConfigError(
                f"{found}, but its rank is {world.rank} of {world.world_size} workers, counted "
                "from 0; unset the variables if they are left over from another program"
            )
        return world


def port_of(job: str) -> int:
    """A port on which all workers of a job agree: 20000 to 29999, below the ephemeral range."""
    number = int(job) if job.isdecimal() else zlib.crc32(job.encode())
    return 20000 + number % 10000


def first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list: `gpu[003-006,9],cpu1` begins with gpu003."""
    matched = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return "".join(part or "" for part in matched.groups()) if matched else ""
