"""Tensor parallelism: the split of layers into parts, their sums, linear layers and vocabulary.

May import parallel.comm and parallel.pipeline.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
