"""torchrun, and every launcher that sets what torch.distributed reads: RANK and WORLD_SIZE."""

from __future__ import annotations

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.worlds.launcher import Environment, Launcher
from holdfast.trainer.worlds.world import WorldInfo


def _read(found: Environment) -> WorldInfo:
    rank, world_size = found.number("RANK"), found.number("WORLD_SIZE")
    if world_size > 1 and "MASTER_ADDR" not in found.variables:
        raise ConfigError(
            f"{found.launcher} with WORLD_SIZE = {world_size}, but MASTER_ADDR is not set: if RANK "
            "and WORLD_SIZE are left over from another program, unset them; else export "
            "MASTER_ADDR and MASTER_PORT, the address of rank 0, for every worker"
        )
    by_agent = found.text("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return WorldInfo(
        rank=rank,
        world_size=world_size,
        local_rank=found.number("LOCAL_RANK", default=rank),
        local_world_size=found.number("LOCAL_WORLD_SIZE", default=world_size),
        node=found.number("GROUP_RANK", default=0),
        store_host=found.variables.get("MASTER_ADDR", "127.0.0.1"),
        store_port=found.port(29500),
        store_is_server=rank == 0 and not by_agent,
        attempt=found.number("TORCHELASTIC_RESTART_COUNT", default=0),
    )


TORCHRUN = Launcher("torchrun", ("RANK", "WORLD_SIZE"), _read)
