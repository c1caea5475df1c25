from .checks import (
    explicit as explicit,
    read_config as read_config,
    unhonoured as unhonoured,
)
from .keys import (
    MODEL_TYPES as MODEL_TYPES,
)
from .shapes import (
    contradictions as contradictions,
    differing as differing,
    further_layers as further_layers,
)
