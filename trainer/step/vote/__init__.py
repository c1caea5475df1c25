"""The vote of a step: what ranks tell of it, and what all of them know afterwards.

May import trainer.config and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
