"""The world of a worker, read from its launcher's environment variables.

A launcher is one file here and one line of LAUNCHERS. May import parallel.links
and parallel.errors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
