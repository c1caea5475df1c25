from .api import (
    Checkpointer as Checkpointer,
    load as load,
    save as save,
)
