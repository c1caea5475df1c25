"""Conversion of checkpoints between this project's format and those of other frameworks.

May import checkpoint, parallel and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
