from .chunk import (
    Weights as Weights,
    build_chunk as build_chunk,
    build_whole_model as build_whole_model,
    initial_values as initial_values,
)
from .compilation import (
    compile_regions as compile_regions,
)
from .family import (
    FAMILIES as FAMILIES,
    RegionSizes as RegionSizes,
    experts_of as experts_of,
    family_of as family_of,
    layer_specs as layer_specs,
    windows_of as windows_of,
)
from .section import (
    ModelConfig as ModelConfig,
)
