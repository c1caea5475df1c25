"""Activation offload: saved tensors wait on an SSD or in host memory for their backward pass.

May import parallel.errors, parallel.layout, parallel.plan, parallel.schedules and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
