from . import (
    checkpoint as checkpoint,
    elastic as elastic,
    launch as launch,
    parallel as parallel,
    trainer as trainer,
)
from .parallel.errors import (
    CheckpointError as CheckpointError,
    ConfigError as ConfigError,
    DataError as DataError,
    HoldfastError as HoldfastError,
)

__version__: str
