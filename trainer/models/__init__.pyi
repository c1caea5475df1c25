from .chunk import (
    Weights as Weights,
    build_chunk as build_chunk,
    build_whole_model as build_whole_model,
    initial_values as initial_values,
)
from .compilation import (
    compile_regions as compile_regions,
    import_compiler as import_compiler,
    mark_compiling as mark_compiling,
)
from .family import (
    FAMILIES as FAMILIES,
    RegionSizes as RegionSizes,
    clips_heads as clips_heads,
    experts_of as experts_of,
    family_of as family_of,
    further_losses_of as further_losses_of,
    in_use as in_use,
    layer_specs as layer_specs,
    serves_training_alone as serves_training_alone,
    windows_of as windows_of,
)
from .section import (
    ModelConfig as ModelConfig,
)
