"""Attention over sequences that are cut into slices, which several ranks may have.

May import _native, parallel.comm, parallel.layout and parallel.pipeline.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
