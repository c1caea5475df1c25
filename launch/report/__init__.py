"""The report of a run: its incidents in sentences, from the files that the run has written.

May import trainer.run, parallel.errors, parallel.output and parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
