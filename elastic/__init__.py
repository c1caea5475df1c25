"""Membership of a run: agreement on generations, detection of losses and hangs, faults.

May import parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
