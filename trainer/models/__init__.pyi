from .chunk import (
    build_chunk as build_chunk,
    build_whole_model as build_whole_model,
)
from .compilation import (
    compile_pieces as compile_pieces,
)
from .family import (
    FAMILIES as FAMILIES,
    PieceSizes as PieceSizes,
    family_of as family_of,
    layer_specs as layer_specs,
)
from .section import (
    ModelConfig as ModelConfig,
)
