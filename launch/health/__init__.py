"""The health of nodes: what is looked at before a node joins a run, alone and beside the others.

May import launch.machine_errors, trainer, parallel.comm, parallel.errors, parallel.files,
parallel.keyed_random, parallel.output and parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
