"""Corpora: text files and prepared tokens, each as one stream of tokens with its documents.

May import trainer.config, checkpoint.format and parallel.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
