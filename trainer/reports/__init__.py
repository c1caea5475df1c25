"""What a run tells: records, metrics, console, traces, slow ranks.

May import trainer.config, run and step, checkpoint, parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
