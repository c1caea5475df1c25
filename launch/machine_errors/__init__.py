"""What the kernel and drivers of this machine count and say of errors, while a run goes on.

May import parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
