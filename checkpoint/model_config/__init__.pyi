from .checks import (
    explicit as explicit,
    read_config as read_config,
    unhonoured as unhonoured,
)
