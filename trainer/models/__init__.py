"""Models as layers that a plan can place: the chunk builder and one folder per family.

May import trainer.config, parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
