"""The configuration of a run: its sections, how a file is loaded, the rules between keys.

Needs no torch. May import trainer.models, parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
