from .matrix import (
    Delay as Delay,
    Edge as Edge,
    delays as delays,
)
from .messages import (
    TimedMessage as TimedMessage,
)
from .probe import (
    probe as probe,
)
from .slow_links import (
    SlowLink as SlowLink,
    slow_links as slow_links,
)
from .window import (
    window_of as window_of,
)
