"""The known launchers, and the one that has started this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from holdfast.trainer.worlds.launcher import Launcher
from holdfast.trainer.worlds.mpi import OPEN_MPI, PMI
from holdfast.trainer.worlds.slurm import SLURM
from holdfast.trainer.worlds.torchrun import TORCHRUN
from holdfast.trainer.worlds.world import WorldInfo

LAUNCHERS: Final = (TORCHRUN, SLURM, OPEN_MPI, PMI)
"""In the order of the search: torchrun may run inside a job of Slurm."""


def world_from_environment(
    environment: Mapping[str, str], launchers: Sequence[Launcher] = LAUNCHERS
) -> WorldInfo | None:
    """The world from the first recognised launcher; None if there is none.

    MASTER_ADDR and MASTER_PORT, if they are set, always name the store.

    Raises:
        ConfigError: a variable is missing or not a number.
    """
    found = next((one for one in launchers if one.recognises(environment)), None)
    return None if found is None else found.world(environment)
