"""The DeepSeek-V3 family (DeepSeek-AI 2024), as `FAMILY`.

May import trainer.models.decoder.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
