"""What a run shows on a terminal: lines of progress, the layout as a table, a live panel.

May import trainer.config and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
