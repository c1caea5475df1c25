"""The hooks on saved tensors: the offloader, its records, prefetch and pace.

May import parallel.offload.stores and policy.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
