"""The GPT-2 family (Radford et al. 2019), as `FAMILY`.

May import trainer.models.decoder and parallel.layout.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
