"""The state of any torch program: what is saved of it, how ranks agree on it, how it is restored.

May import checkpoint.format, checkpoint.loading, parallel.errors, parallel.layout,
parallel.reading and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
