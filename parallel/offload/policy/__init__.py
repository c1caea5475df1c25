"""How much is offloaded: measured amounts, the choice per layer, estimates for plans.

May import parallel.errors, parallel.layout, parallel.plan and parallel.schedules.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
