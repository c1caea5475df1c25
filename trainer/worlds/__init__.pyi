from .registry import (
    LAUNCHERS as LAUNCHERS,
    world_from_environment as world_from_environment,
)
