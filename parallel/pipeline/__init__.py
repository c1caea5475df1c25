"""The executor of programs, and the model chunks that it runs.

May import parallel.comm, parallel.layout, parallel.offload and parallel.schedules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
