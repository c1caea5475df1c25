"""Evidence of a process that hangs or fails: its stacks, its state and memory, and one file of it.

May import parallel.files, parallel.reading and parallel.output.whole_files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
