from .registry import (
    LAUNCHERS as LAUNCHERS,
    world_from_environment as world_from_environment,
)
from .world import (
    WorldInfo as WorldInfo,
    local_world as local_world,
)
