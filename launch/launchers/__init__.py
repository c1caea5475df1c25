"""The start of a run's workers: on this machine, or as nodes of a cluster.

May import launch.agent, launch.health, launch.machine_errors, launch.processes, trainer,
checkpoint.tiers, elastic and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
