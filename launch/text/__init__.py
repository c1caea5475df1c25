"""Text and models: what a model makes of a prompt, and its loss on text. Used by one process.

May import trainer.config, trainer.data, trainer.models, trainer.step, checkpoint and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
