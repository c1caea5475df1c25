"""Tools on checkpoints: inspect, verify and compare.

May import checkpoint.format, checkpoint.loading, checkpoint.stores, parallel.errors,
parallel.layout, parallel.reading and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
