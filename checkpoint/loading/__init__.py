"""Loading: the read plan, readers, and memory shared by the ranks of a node.

May import checkpoint.format, parallel.errors, parallel.layout, parallel.reading and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
