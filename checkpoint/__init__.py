"""Checkpoints: state is saved and loaded in any layout.

`save`, `load` and `Checkpointer` serve any torch program. Below them, and below the trainer,
`manager.CheckpointManager` saves and loads. May import parallel and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
