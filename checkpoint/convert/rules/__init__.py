"""Formats as rules: patterns, mappings and their inverse.

May import checkpoint.convert.elements, checkpoint.format, parallel.errors, parallel.layout and
parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
