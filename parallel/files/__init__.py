"""Files and folders of a process: locks, and temporary folders of which nothing is left.

May import parallel.errors and parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
