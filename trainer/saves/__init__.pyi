from .checkpointing import (
    Checkpoints as Checkpoints,
)
