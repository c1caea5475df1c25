"""Open MPI's mpirun (OMPI_*), and launchers with PMI, such as MPICH's."""

from __future__ import annotations

import re
from collections.abc import Callable

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.worlds.launcher import Environment, Launcher, port_of
from holdfast.trainer.worlds.world import WorldInfo


def _reader(
    rank: str, size: str, local_rank: str, local_size: str
) -> Callable[[Environment], WorldInfo]:
    """The reader of a world from variables of these names."""

    def read(found: Environment) -> WorldInfo:
        own, world_size = found.number(rank), found.number(size)
        local_world_size = found.number(local_size, default=world_size)
        host = found.variables.get("MASTER_ADDR")
        if host is None:
            if local_world_size != world_size:
                raise ConfigError(
                    "MASTER_ADDR is not set, and the MPI job spans several machines; export it "
                    "with the name of the first one (mpirun -x MASTER_ADDR=...)"
                )
            host = "127.0.0.1"
        job = found.text("PMIX_NAMESPACE", "PMI_JOBID", default="0")
        return WorldInfo(
            rank=own,
            world_size=world_size,
            local_rank=found.number(local_rank, default=own),
            local_world_size=local_world_size,
            node=0,
            store_host=host,
            store_port=found.port(port_of(job)),
            store_is_server=own == 0,
            job="mpi-" + re.sub(r"[^\w.-]", "-", job),
        )

    return read


OPEN_MPI = Launcher(
    "Open MPI",
    ("OMPI_COMM_WORLD_RANK",),
    _reader(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
)
PMI = Launcher(
    "PMI",
    ("PMI_RANK",),
    _reader("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
