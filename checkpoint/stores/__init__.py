"""Checkpoint stores: the protocol, local folders, URLs, and the registry by scheme.

May import checkpoint.format, checkpoint.loading, parallel.errors, parallel.files and
parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
