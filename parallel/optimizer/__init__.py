"""Gradient sums, their reduction, the sharded optimizer, its shadows and the transfer of its state.

May import parallel.comm, parallel.errors, parallel.layout, parallel.plan, parallel.precision and
_native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
