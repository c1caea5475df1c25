"""The configuration of a run: its sections, the loading of a file, the rules between keys.

Needs no torch. May import trainer.learning_rates, trainer.models, checkpoint.format,
checkpoint.model_config and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
