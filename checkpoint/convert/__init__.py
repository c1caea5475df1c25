"""Checkpoints of other frameworks, to and from ours and each other.

May import checkpoint and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
