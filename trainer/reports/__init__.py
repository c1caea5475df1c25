"""The reports of a run: records, metrics, console, traces, slow ranks.

May import trainer.config, trainer.data, trainer.run, trainer.step, trainer.worlds, checkpoint and
parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
