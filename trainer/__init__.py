"""One training run: configuration, model, data, step loop and reports.

May import checkpoint, elastic, parallel and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
