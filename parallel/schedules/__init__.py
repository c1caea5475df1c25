"""Pipeline schedules as data: programs are made, checked, simulated and drawn. Beside them, the
names of the phases of a step.

May import parallel.errors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
