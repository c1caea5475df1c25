from .chunked_loss import (
    chunked_cross_entropy_sum as chunked_cross_entropy_sum,
)
from .linear import (
    Weight as Weight,
    column_linear as column_linear,
    in_slice as in_slice,
    of_parts as of_parts,
    row_linear as row_linear,
    sum_partials as sum_partials,
    to_parts as to_parts,
)
from .split import (
    TensorParallel as TensorParallel,
)
from .vocab import (
    cross_entropy_sum as cross_entropy_sum,
    embed as embed,
)
