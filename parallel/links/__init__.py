"""Links: authenticated connections between the processes of one run.

A server without authentication (torch's TCPStore, torchft's Lighthouse) is private: the kernel
lets only its own process connect. A door in that process listens for the others, which must hold
the run's secret. A tunnel leads from a loopback address, which only chosen processes may use, to a
door.

May import parallel.errors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
