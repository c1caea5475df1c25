"""The agreement of workers on their next generation: reports, the rule, attendance, what is kept.

May import elastic.generation and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
