"""What a model's config.json says: the keys that are honoured, that do not matter, and the others.

May import parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
