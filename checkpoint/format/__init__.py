"""The format of checkpoints: safetensors files with boxes, the manifest, folders and their names.

May import parallel.errors, parallel.layout, parallel.precision, parallel.reading and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
