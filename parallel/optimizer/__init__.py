"""The optimizer: gradient sums, their reduction, sharded state, shadows and state transfer.

May import parallel.comm, parallel.errors, parallel.layout, parallel.plan, parallel.precision,
parallel.schedules and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
