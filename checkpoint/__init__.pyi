from .api import (
    Checkpointer as Checkpointer,
    load as load,
    save as save,
)
from .manager import (
    CheckpointManager as CheckpointManager,
    ManagerSettings as ManagerSettings,
    Wanted as Wanted,
)
