"""The times of messages between ranks, and the slow links that their matrix shows.

May import parallel.comm.flight_recorder, parallel.comm.protocol, parallel.comm.tags and
parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
