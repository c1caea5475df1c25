"""The check of a layout: a few steps of it at tiny size are compared with one process.

The layout runs on local CPU ranks in float64. The reference is the unsharded model under a plain
autograd loop with torch.optim.AdamW. The first difference is named, with the collective that is
missing.

May import trainer and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
