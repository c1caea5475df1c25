"""One step of one rank: compute, reduce, vote, apply, and the state that it changes.

May import trainer.config, trainer.data, trainer.models, trainer.worlds, checkpoint and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
