from .matrix import (
    delays as delays,
)
from .probe import (
    probe as probe,
)
from .slow_links import (
    SlowLink as SlowLink,
    slow_links as slow_links,
)
from .window import (
    Window as Window,
    window_of as window_of,
)
