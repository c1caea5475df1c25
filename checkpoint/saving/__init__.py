"""Saving: the write plan, lazy snapshots, and the commit of a checkpoint.

May import checkpoint.format, checkpoint.stores, parallel and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
