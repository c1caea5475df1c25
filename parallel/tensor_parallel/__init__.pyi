from .operators import (
    TensorParallel as TensorParallel,
)
from .vocab import (
    cross_entropy_sum as cross_entropy_sum,
    embed as embed,
)
