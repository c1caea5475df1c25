"""Training data: the content of sample i is a pure function of the configuration, the seed and i.

May import trainer.config, checkpoint.format, parallel and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
