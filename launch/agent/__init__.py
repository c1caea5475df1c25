"""The agent of a node: it starts, watches and replaces workers, and reports for ended ones.

May import launch.machine_errors, launch.processes, elastic, parallel.comm, parallel.links,
parallel.errors, parallel.files, parallel.output and parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
