"""The way from one tier to the next: memory to disk when a worker dies, disk to a URL meanwhile.

May import checkpoint.format, checkpoint.saving, checkpoint.stores, checkpoint.tools, parallel.comm,
parallel.errors and parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
