"""Going back to an earlier step from memory: why, how far, and without which samples.

May import trainer.config, trainer.data, trainer.reports, trainer.run, trainer.step, trainer.saves,
checkpoint.format, checkpoint.stores and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
