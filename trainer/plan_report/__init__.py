"""The report of `holdfast plan`: layout, memory, losses of ranks, offload.

May import trainer.config, trainer.data, trainer.models, trainer.reports, trainer.run, trainer.step
and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
