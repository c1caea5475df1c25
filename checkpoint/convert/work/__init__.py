"""A conversion: the request, its workers, the journal, and the sample that is compared.

May import checkpoint.convert, checkpoint.format, checkpoint.loading, checkpoint.stores,
parallel.errors, parallel.files, parallel.output, parallel.reading and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
