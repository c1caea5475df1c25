from .contributions import (
    shared_gradients as shared_gradients,
)
from .layer_parameters import (
    LayerParameters as LayerParameters,
)
from .shares import (
    kept_spans as kept_spans,
)
