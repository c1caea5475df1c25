"""Proofs of correct training: check, prove, replay, bisect, audit, comparison of runs.

May import launch.agent, launch.launchers, launch.processes, trainer, checkpoint, elastic,
parallel.errors, parallel.links, parallel.output, parallel.files and parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
