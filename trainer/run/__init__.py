"""The folder of a run, the point from which it resumes, and the values resolved before it starts.

May import trainer.config, trainer.data, trainer.learning_rates, trainer.models, trainer.step,
checkpoint and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
