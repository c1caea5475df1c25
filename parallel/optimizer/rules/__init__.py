"""The optimizers: their kinds of state, constants and updates, and the groups of parameters.

May import parallel.layout, parallel.plan and parallel.precision.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
