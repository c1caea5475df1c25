"""The terms of a rank: what it is going to train with. Ranks with different terms do not train.

May import trainer.config, trainer.models, trainer.step, checkpoint.format and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
