"""Where checkpoints lie beyond the local folder: remote stores, and copies between tiers.

May import checkpoint.format and saving.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
