from .chunk import (
    DTYPES as DTYPES,
    build_chunk as build_chunk,
    new_chunks as new_chunks,
)
from .llama import (
    layer_specs as layer_specs,
)
