"""The output of a process: files that are only added to, whole files, and its standard streams,
which are made safe at its start.

None of it ends a run. What the disk refuses is kept in memory and tried again; text that is not
read is left out.

May import parallel.errors, parallel.files and parallel.reading.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
