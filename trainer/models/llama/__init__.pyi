from .modules import (
    Block as Block,
    Embedding as Embedding,
    Head as Head,
    RotaryEmbedding as RotaryEmbedding,
)
from .table import (
    layer_specs as layer_specs,
)
