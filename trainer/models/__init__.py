"""Models as layers for a plan: the registry of families and the chunk builder.

One folder per family. May import parallel and checkpoint.model_config.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
