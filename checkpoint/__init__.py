"""Saving and loading state in any layout. May import `holdfast.parallel` and `holdfast._native`.

For any torch program: `save`, `load` and `Checkpointer`. Below them, and below the
trainer, `manager.CheckpointManager` saves and loads.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
