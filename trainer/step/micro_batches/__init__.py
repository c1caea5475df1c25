"""The micro-batches of a step on one rank: what they are, which it claims, which its sums include.

May import trainer.config, trainer.data, trainer.step.vote and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
