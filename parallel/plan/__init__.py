"""The plan: who holds, computes, owns and shadows what, as a pure function; no torch.

May import parallel.layout, parallel.schedules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
