"""Stores of checkpoints: the protocol, local folders, URLs, and which of them serves a place.

May import checkpoint.format and loading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
