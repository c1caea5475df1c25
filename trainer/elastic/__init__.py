"""Elastic training: it continues when ranks are lost or join. The loop, recovery, incidents.

May import trainer, elastic, parallel and _native.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
