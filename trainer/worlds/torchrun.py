"""torchrun, and every launcher that sets what torch.distributed reads: RANK and WORLD_SIZE."""

from __future__ import annotations

from holdfast.trainer.worlds.launcher import Environment, Launcher
from holdfast.trainer.worlds.world import WorldInfo


def _read(found: Environment) -> WorldInfo:
    rank, world_size = found.number("RANK"), found.number("WORLD_SIZE")
    by_agent = found.text("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return WorldInfo(
        rank=rank,
        world_size=world_size,
        local_rank=found.number("LOCAL_RANK", default=rank),
        local_world_size=found.number("LOCAL_WORLD_SIZE", default=world_size),
        node=found.number("GROUP_RANK", default=0),
        store_host=found.variables.get("MASTER_ADDR", "127.0.0.1"),
        store_port=found.number("MASTER_PORT", default=29500),
        store_is_server=rank == 0 and not by_agent,
        attempt=found.number("TORCHELASTIC_RESTART_COUNT", default=0),
    )


TORCHRUN = Launcher("torchrun", ("RANK", "WORLD_SIZE"), _read)
