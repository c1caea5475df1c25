"""Experts: the routing of tokens, their exchange between ranks, and the products of each expert.

May import parallel.comm, parallel.layout, parallel.pipeline and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
