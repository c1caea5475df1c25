from .api import (
    Checkpointer as Checkpointer,
    load as load,
    save as save,
)
from .loading import LoadStatistics as LoadStatistics
from .manager import (
    CheckpointManager as CheckpointManager,
    ManagerSettings as ManagerSettings,
    Wanted as Wanted,
)
from .saving import SaveResult as SaveResult
