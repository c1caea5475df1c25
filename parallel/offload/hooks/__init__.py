"""The hooks on saved tensors: the offloader, its records, prefetch and pace.

May import parallel.offload.policy, parallel.offload.stores, parallel.errors and parallel.schedules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
