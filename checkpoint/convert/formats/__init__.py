"""The formats: one module or folder each, and their registry.

May import checkpoint.convert's elements, rules, sources and writing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
