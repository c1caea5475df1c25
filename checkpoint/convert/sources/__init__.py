"""Sources: recognition, files, pickles, catalogs, and the engine that fetches pieces.

May import checkpoint.convert.elements, checkpoint.convert.rules, checkpoint.format,
checkpoint.model_config, checkpoint.stores, parallel.errors, parallel.layout, parallel.optimizer,
parallel.reading and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
