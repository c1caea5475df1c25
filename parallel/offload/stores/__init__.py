"""Where offloaded activations wait: on a disk, in host memory, or staged through it.

May import parallel.errors, holdfast._native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
