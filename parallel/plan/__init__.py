"""The plan: which rank holds, computes, owns and shadows what. Pure functions, no torch.

May import parallel.errors, parallel.layout, parallel.precision, parallel.reading and
parallel.schedules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
