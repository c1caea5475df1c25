from .modules import (
    Embedding as Embedding,
    Head as Head,
    RotaryEmbedding as RotaryEmbedding,
    TransformerLayer as TransformerLayer,
)
from .table import (
    layer_specs as layer_specs,
)
