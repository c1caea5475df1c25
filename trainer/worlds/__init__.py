"""How the world of a worker is read from the environment that its launcher gives it.

A launcher is one file here and one line of LAUNCHERS. May import trainer.world and parallel.errors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
