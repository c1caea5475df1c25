from .chunked_loss import (
    chunked_cross_entropy_sum as chunked_cross_entropy_sum,
)
from .linear import (
    in_slice as in_slice,
)
from .operators import (
    TensorParallel as TensorParallel,
)
from .vocab import (
    cross_entropy_sum as cross_entropy_sum,
    embed as embed,
)
