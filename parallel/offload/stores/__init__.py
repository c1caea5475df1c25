"""The offload stores: places where activations wait, on a drive or in host memory.

May import parallel.errors and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
