"""The writers: torch.save archives, pickles, torch.distributed.checkpoint folders.

May import checkpoint.convert.elements, checkpoint.convert.sources, checkpoint.format,
checkpoint.stores, parallel.errors and parallel.layout.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
