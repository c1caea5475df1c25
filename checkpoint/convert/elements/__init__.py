"""The elements of a conversion: pieces, regions, arrays of bits, units of output.

May import checkpoint.format, parallel.errors and parallel.layout.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
