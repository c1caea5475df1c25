"""The formats: one module or folder each, and their registry.

May import checkpoint.convert.elements, checkpoint.convert.rules, checkpoint.convert.sources,
checkpoint.convert.writing, checkpoint.format, checkpoint.loading, checkpoint.model_config,
checkpoint.saving, checkpoint.stores, checkpoint.tools, parallel.errors, parallel.layout,
parallel.optimizer and parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
