"""The Llama family: its modules and its table of parameters.

May import trainer.config, parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
