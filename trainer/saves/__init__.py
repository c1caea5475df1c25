"""The checkpoints of a run: when it saves, and how its state is saved and resumed; going back.

May import trainer.config, trainer.data, trainer.reports, trainer.run, trainer.step, trainer.terms,
trainer.worlds, checkpoint and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
